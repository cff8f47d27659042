"""A trace store: the memory-mapped reader, and a writer for traces that are there already.

Layout: ``shards.py``; columns and bytes a sample: ``schema.py``. At D = 5120, float16 and Top-8 a sample takes 10.5 kB,
at D = 5120, float32 and a full map of 698 tokens 23.5 kB (full last-layer states: 14.3 MB, or 7.1 MB in 16 bit). The
extraction (laavit/teachers/engine.py) writes shards by itself, in any order and from several processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from laavit.files import remove_leftovers, write_bytes
from laavit.registry import UserError, nearest
from laavit.structures import Trace
from laavit.traces import shards
from laavit.traces.schema import VERDICT_FEATURES, Row, decode, encode, storage, trace_features
from laavit.traces.shards import Header, Record, Shard

logger = logging.getLogger(__name__)


class TraceStore(Sequence[Trace]):
    """A memory-mapped trace store; traces come with the verdicts that filters have written since.

    Args:
        path: the store's folder.
        verify: compare every shard with its recorded SHA-256 (about a second for 2 GB), not only its size.
        complete: False opens a store of which shards are missing or damaged (``missing`` says which) without them.

    Attributes:
        header: what the traces were made with (teacher, weights, processor, prompts, settings, versions, data).
        ids: the samples that have a trace, in the data's order.
        quarantined: the samples that were put aside, and why.
        planned: how many samples the store is about. missing: shard number -> what is wrong with it.

    Raises:
        UserError: no store there, another schema version, a damaged or missing shard, a sample twice.
    """

    def __init__(self, path: str | Path, verify: bool = True, complete: bool = True) -> None:
        self.path = Path(path)
        content = shards.read_header(self.path)
        if content is None:
            raise UserError(f"there is no trace store at '{self.path}'")
        self._header = content
        self.header: dict[str, Any] = content.content
        self.planned = content.count
        self._top_k, self._dtype, _ = storage(self.header)
        self._records: dict[int, Record] = {}
        self.missing: dict[int, str] = {}
        for index in range(content.shards):
            record = shards.read_record(self.path, index, verify)
            if isinstance(record, str):
                self.missing[index] = record
            else:
                self._records[index] = record
        if complete and self.missing:
            raise UserError(f"the trace store '{self.path}' {_lacks(self.path, self.missing, content)}")
        self._shards = [Shard(shards.shard_path(self.path, index)) for index in self._records]
        self._stops = list(accumulate(record.count for record in self._records.values()))
        self.ids: tuple[str, ...] = tuple(key for shard in self._shards for key in shard.ids())
        self._places = {key: place for place, key in enumerate(self.ids)}
        if len(self._places) != len(self.ids):
            twice = next(key for place, key in enumerate(self.ids) if self._places[key] != place)
            raise UserError(f"the trace store '{self.path}' holds sample '{twice}' twice")
        aside = (record.quarantined for record in self._records.values())
        self.quarantined: dict[str, str] = {key: reason for part in aside for key, reason in part.items()}
        self._verdicts: dict[str, dict[str, tuple[bool, float]]] = {}
        for file in sorted((self.path / "verdicts").glob("[!.]*.arrow")):
            rows = shards.read_rows(file)
            self._verdicts[file.stem] = {row["sample_id"]: (row["verdict"], row["score"]) for row in rows}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Trace:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"trace {index} of {len(self)}")
        place = index % len(self)
        number = bisect_right(self._stops, place)
        row = self._shards[number].row(place - (self._stops[number - 1] if number else 0))
        for name, column in self._verdicts.items():
            if row["sample_id"] in column:
                verdict, score = column[row["sample_id"]]
                _put(row, "verdict", name, verdict)
                _put(row, "score", name, score)
        return decode(row, self._top_k is not None, self._dtype)

    def __iter__(self) -> Iterator[Trace]:
        return (self[place] for place in range(len(self)))

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._places

    def get(self, sample_id: str) -> Trace:
        """The trace of a sample; a ``UserError`` names the id and the store where there is none."""
        if sample_id not in self._places:
            why = f"it was put aside: {self.quarantined[sample_id]}" if sample_id in self.quarantined else ""
            raise UserError(
                f"the trace store '{self.path}' has no trace of sample '{sample_id}' ({why or f'{len(self)} traces'})"
            )
        return self[self._places[sample_id]]

    def require(self, sample_ids: Iterable[str]) -> None:
        """Stop before the first step if any sample has no trace."""
        missing = [key for key in sample_ids if key not in self._places]
        if missing:
            named = ", ".join(f"'{key}'" for key in missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise UserError(f"the trace store '{self.path}' lacks the traces of {len(missing)} samples: {named}")

    def check(self, expected: Mapping[str, Any]) -> None:
        """Compare some of the header's keys (nested ones too) with what a recipe expects; a ``UserError`` lists all."""
        if parts := shards.differences(self.header, json.loads(json.dumps(expected)), subset=True):
            raise UserError(f"the trace store '{self.path}' does not fit the recipe: {'; '.join(parts)}")

    def verdicts(self) -> dict[str, dict[str, bool]]:
        """Every written filter's verdicts: name -> sample id -> whether it passes."""
        return {name: {key: verdict for key, (verdict, _) in column.items()} for name, column in self._verdicts.items()}

    def scores(self, name: str) -> dict[str, float]:
        """One written filter's scores: sample id -> figure."""
        return {key: score for key, (_, score) in self._column(name).items()}

    def select(self, names: Sequence[str]) -> tuple[str, ...]:
        """The ids, in the store's order, that pass all the named filters.

        Raises:
            UserError: a filter has no verdicts here, or lacks one for a trace that was added after it ran.
        """
        for name in names:
            missing = [key for key in self.ids if key not in self._column(name)]
            if missing:
                raise UserError(
                    f"the filter '{name}' has no verdict on sample '{missing[0]}' ({len(missing)} in all): run it again"
                )
        return tuple(key for key in self.ids if all(self._verdicts[name][key][0] for name in names))

    def _column(self, name: str) -> dict[str, tuple[bool, float]]:
        if name not in self._verdicts:
            raise UserError(
                f"the trace store '{self.path}' has no verdicts of a filter '{name}'; {nearest(name, self._verdicts)}"
            )
        return self._verdicts[name]

    def write_verdicts(self, name: str, verdicts: Mapping[str, bool], scores: Mapping[str, float]) -> None:
        """Add or overwrite one filter's column (a side file; shards and other columns stay untouched).

        Raises:
            UserError: a sample of the store has no verdict or score, or one of them is about no sample of the store.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise UserError(f"'{name}' is no name for a filter's column; allowed: letters, digits, '_', '-', '.'")
        for given in (verdicts, scores):
            strays, missing = given.keys() - self._places.keys(), self._places.keys() - given.keys()
            if strays or missing:
                what, key = ("unknown sample", min(strays)) if strays else ("missing sample", min(missing))
                raise UserError(f"the verdicts of '{name}' do not fit the trace store '{self.path}': {what} '{key}'")
        column = {key: (bool(verdicts[key]), float(scores[key])) for key in self.ids}
        rows = [{"sample_id": key, "verdict": verdict, "score": score} for key, (verdict, score) in column.items()]
        folder = self.path / "verdicts"
        folder.mkdir(exist_ok=True)
        write_bytes(folder / f"{name}.arrow", shards.stream_bytes(rows, VERDICT_FEATURES))
        self._verdicts[name] = column

    def digest(self, verdicts: Sequence[str] = ()) -> str:
        """SHA-256 over the header, all shards, and the named filters' columns: what a run has to note down."""
        total = hashlib.sha256(shards.canonical(self._header.as_json()))
        for record in self._records.values():
            total.update(record.sha256.encode())
        for name in sorted(verdicts):
            column = [(key, *self._column(name)[key]) for key in self.ids if key in self._column(name)]
            total.update(shards.canonical([name, column]))
        return total.hexdigest()

    def bytes_per_sample(self) -> float:
        """Size of the shards on disk over the number of traces."""
        return sum(record.bytes for record in self._records.values()) / max(len(self), 1)


def _put(row: Row, kind: str, name: str, value: Any) -> None:
    """Set a named verdict or score of a row; a written column goes before what the trace was stored with."""
    names, values = row[f"{kind}_names"], row[f"{kind}_values"]
    if name in names:
        values[names.index(name)] = value
    else:
        names.append(name)
        values.append(value)


def _lacks(folder: Path, missing: Mapping[int, str], header: Header) -> str:
    """What an incomplete store lacks, as a part of a sentence."""
    first = "; ".join(f"{shards.shard_path(folder, i).name} ({why})" for i, why in list(missing.items())[:3])
    more = ", ..." if len(missing) > 3 else ""
    return f"lacks {len(missing)} of its {header.shards} shards: {first}{more}: run the extraction again to fill it up"


def verify(path: str | Path) -> dict[str, str]:
    """Everything that is wrong with a store, file -> what; empty where all is well.

    Finds missing, unfinished, truncated and changed shards, shards whose samples are not those of their record, samples
    that are there twice, and files that belong to no planned shard.

    Raises:
        UserError: there is no store, or its header is broken or of another schema version.
    """
    folder = Path(path)
    header = shards.read_header(folder)
    if header is None:
        raise UserError(f"there is no trace store at '{folder}'")
    found: dict[str, str] = {}
    seen: dict[str, str] = {}
    for index in range(header.shards):
        name, record = shards.shard_path(folder, index).name, shards.read_record(folder, index)
        if isinstance(record, str):
            found[name] = record
            continue
        ids = Shard(folder / name).ids()
        planned = min(header.shard_size, header.count - index * header.shard_size)
        if len(ids) != record.count or len(ids) + len(record.quarantined) != planned:
            found[name] = f"holds {len(ids)} traces and {len(record.quarantined)} put aside, of {planned} samples"
        elif not record.quarantined and shards.ids_digest(ids) != record.samples:
            found[name] = "holds other samples than planned, or in another order"
        for key in (*ids, *record.quarantined):
            if key in seen:
                found[name] = f"sample '{key}' is in {seen[key]} too"
            seen[key] = name
    for index in shards.shard_indices(folder):
        if index >= header.shards:
            found[shards.shard_path(folder, index).name] = f"is beyond the {header.shards} planned shards"
    return found


class TraceWriter:
    """Writes traces one after another into a new store (a subset, a conversion); its header comes last, at ``close``.

    Args:
        path: the store's folder, made if it does not exist, empty if it does.
        header: what the traces were made with, plain JSON data. ``gaze_top_k`` (int or None, default None: the full
            map), ``semantics_dtype`` ('float32', 'float16' or 'bfloat16', default 'float32') and ``settings.logits``
            (answer logits a token, default 0) in it decide what is stored.
        shard_size: samples a shard, those put aside included.

    Raises:
        UserError: the folder is not empty, another process is writing there, bad settings.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any], shard_size: int = 128) -> None:
        self.path = Path(path)
        if shard_size < 1:
            raise UserError(f"shard_size is at least 1, got {shard_size}")
        self.header = shards.complete_header(header)
        self._storing = storage(self.header)
        self._features = trace_features(*self._storing[1:])
        self._size, self._ids, self._known = shard_size, list[str](), set[str]()
        self._rows: list[Row] = []
        self._aside: dict[str, str] = {}
        self._width: int | None = None
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"the trace store's place '{self.path}' is a file")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(f"another process is writing to the trace store '{self.path}'") from error
        others = sorted(file.name for file in self.path.iterdir() if not file.name.startswith("."))
        if others:
            self._lock.release()
            raise UserError(f"the place of a new trace store, '{self.path}', is not empty (it holds '{others[0]}')")
        remove_leftovers(self.path)

    def append(self, trace: Trace) -> None:
        """Add one trace.

        Raises:
            UserError: the sample is there already, or the trace does not fit (shapes, non-finite figures).
        """
        row = encode(trace, *self._storing)
        width = len(row["semantics"]) // max(len(row["semantic_tokens"]), 1)
        if self._width not in (None, width):
            raise UserError(
                f"the semantics of sample '{trace.sample_id}' are {width} wide, those of the store {self._width}"
            )
        self._take(trace.sample_id)
        self._width = width
        self._rows.append(row)
        self._flush(full=True)

    def extend(self, traces: Iterable[Trace]) -> None:
        """Add traces; errors as ``append``."""
        for trace in traces:
            self.append(trace)

    def quarantine(self, sample_id: str, reason: str) -> None:
        """Add a sample that was put aside.

        Raises:
            UserError: the sample is there already.
        """
        self._take(sample_id)
        self._aside[sample_id] = reason
        self._flush(full=True)

    def _take(self, sample_id: str) -> None:
        if sample_id in self._known:
            raise UserError(f"the trace store '{self.path}' already holds sample '{sample_id}'")
        self._known.add(sample_id)
        self._ids.append(sample_id)

    def _flush(self, full: bool) -> None:
        count = len(self._rows) + len(self._aside)
        if count == self._size if full else count:
            digest = shards.ids_digest(self._ids[-count:])
            index = (len(self._ids) - 1) // self._size
            shards.write_shard(self.path, index, self._rows, self._features, digest, self._aside)
            self._rows, self._aside = [], {}

    def close(self) -> None:
        """Write what is buffered and the header."""
        if self._lock.is_locked:
            self._flush(full=False)
            digest = shards.ids_digest(self._ids)
            shards.write_header(self.path, Header(self._size, len(self._ids), digest, self.header))
            self._lock.release()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # without its header the folder is no store
            self._lock.release()
