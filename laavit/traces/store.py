"""The trace store: an append-only, resumable writer and a memory-mapped reader (layout: ``shards.py``).

Size of one sample, D semantics wide, N image tokens, Top-K gaze: ``(4 or 2) D + 8 k`` bytes, or ``(4 or 2) D + 4 N``
with the full map, plus about 100 bytes and the answer's text. At D = 5120, float16 and k = 8 that is 10.4 kB, at
D = 5120, float32 and N = 698 it is 23.4 kB (full last-layer states: 7.1 MB); ``bytes_per_sample`` measures it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from datasets import Dataset, concatenate_datasets
from filelock import FileLock, Timeout

from laavit.files import remove_leftovers, write_bytes
from laavit.registry import UserError, nearest
from laavit.structures import Trace
from laavit.traces import shards
from laavit.traces.shards import SEMANTICS_DTYPES, Row

logger = logging.getLogger(__name__)


class TraceWriter:
    """Appends traces in the samples' order, and picks up where an interrupted run stopped.

    A shard holds ``shard_size`` traces and is on disk as a whole or not at all; only ``close`` writes a shorter last
    one, which a later run fills up first. A run that appends its samples in one fixed order, skipping those in
    ``done``, therefore leaves the same bytes however often it was killed.

    Args:
        path: the store's folder, made if it does not exist.
        header: what the traces were made with (teacher, weight hash, processor, prompts, settings), plain JSON data.
            ``gaze_top_k`` (int or None, default None: the full map) and ``semantics_dtype`` ('float32' or 'float16',
            default 'float32') in it decide what is stored; a key left out is written with its default.
        shard_size: traces a shard.

    Attributes:
        done: ids of the samples whose traces are stored or buffered.

    Raises:
        UserError: another header or shard size than the store was begun with, another process writing, bad settings.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any], shard_size: int = 128) -> None:
        self.path = Path(path)
        if shard_size < 1:
            raise UserError(f"shard_size is at least 1, got {shard_size}")
        self.header = _complete_header(header)
        self._top_k: int | None = self.header["gaze_top_k"]
        self._dtype: str = self.header["semantics_dtype"]
        self._features = shards.trace_features(self._dtype)
        self._size = shard_size
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"the trace store's place '{self.path}' is a file")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(f"another process is writing to the trace store '{self.path}'") from error
        self.done: set[str] = set()
        self._width: int | None = None
        self._complete: set[int] = set()
        self._partial: dict[int, list[Row]] = {}
        try:
            self._open()
        except UserError:
            self._lock.release()
            raise
        self._index = 0
        self._begin_shard()

    def _open(self) -> None:
        content: dict[str, Any] = {"schema": shards.SCHEMA, "shard_size": self._size, "header": self.header}
        found = shards.read_header(self.path)
        if found is None:
            others = sorted(file.name for file in self.path.iterdir() if not file.name.startswith("."))
            if others:
                raise UserError(f"'{self.path}' is no trace store and not empty (it holds '{others[0]}')")
            write_bytes(self.path / "header.json", shards.canonical(content))
        else:
            there, here = ({"shard_size": c["shard_size"], **c["header"]} for c in (found, content))
            if parts := shards.differences(there, here, subset=False):
                raise UserError(f"the trace store '{self.path}' was begun with other settings: {'; '.join(parts)}")
        remove_leftovers(self.path)
        for index in shards.shard_indices(self.path):
            self._take(index)

    def _take(self, index: int) -> None:
        """Count one shard's samples as done, or drop it to be done again."""
        path, record = shards.shard_path(self.path, index), shards.shard_record(self.path, index)
        if record is None:
            logger.warning("dropping the unfinished or damaged shard %s: its samples are extracted again", path.name)
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
            return
        rows = shards.table_rows(Dataset.from_file(str(path), in_memory=True).data.table)
        self.done.update(row["sample_id"] for row in rows)
        self._width = len(rows[0]["semantics"])
        if record["count"] == self._size:
            self._complete.add(index)
        else:
            self._partial[index] = rows

    def _begin_shard(self) -> None:
        while self._index in self._complete:
            self._index += 1
        self._rows = self._partial.pop(self._index, [])
        self._changed = False

    def append(self, trace: Trace) -> None:
        """Add one trace; every ``shard_size``-th one writes a shard.

        Raises:
            UserError: the sample is there already, or the trace does not fit (shapes, non-finite figures).
        """
        self.extend([trace])

    def extend(self, traces: Iterable[Trace]) -> None:
        """Add a batch of traces: all of them, or none where one of them does not fit.

        Raises:
            UserError: as ``append``.
        """
        rows: dict[str, Row] = {}
        width = self._width
        for trace in traces:
            if trace.sample_id in self.done or trace.sample_id in rows:
                raise UserError(f"the trace store '{self.path}' already holds sample '{trace.sample_id}'")
            row = shards.encode(trace, self._top_k, self._dtype)
            if width not in (None, len(row["semantics"])):
                raise UserError(
                    f"the semantics of sample '{trace.sample_id}' are {len(row['semantics'])} wide, the store's {width}"
                )
            width, rows[trace.sample_id] = len(row["semantics"]), row
        self._width = width
        for sample_id, row in rows.items():
            self._rows.append(row)
            self._changed = True
            self.done.add(sample_id)
            if len(self._rows) == self._size:
                self._flush()
                self._complete.add(self._index)
                self._begin_shard()

    def _flush(self) -> None:
        shards.write_shard(self.path, self._index, self._rows, self._features)

    def close(self) -> None:
        """Write what is buffered as a shorter shard and release the store."""
        if self._lock.is_locked:
            if self._changed:
                self._flush()
                self._changed = False
            self._lock.release()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also after an error: what was extracted is right, and a shorter shard is filled up by the next run.
        self.close()


class TraceStore(Sequence[Trace]):
    """A memory-mapped trace store; traces come with the verdicts that filters have written since.

    Args:
        path: the store's folder.
        verify: compare every shard with its recorded SHA-256 (about a second for 2 GB), not only its size.

    Raises:
        UserError: no store there, another schema version, a damaged or missing shard.
    """

    def __init__(self, path: str | Path, verify: bool = True) -> None:
        self.path = Path(path)
        content = shards.read_header(self.path)
        if content is None:
            raise UserError(f"there is no trace store at '{self.path}'")
        self.header: dict[str, Any] = content["header"]
        self._content = content
        self._records = []
        indices = shards.shard_indices(self.path)
        for index in range(indices[-1] + 1 if indices else 0):
            record = shards.shard_record(self.path, index, verify)
            if record is None:
                name = shards.shard_path(self.path, index).name
                raise UserError(f"the trace store '{self.path}' has a missing or damaged {name}: resume the extraction")
            self._records.append(record)
        files = [str(shards.shard_path(self.path, index)) for index in range(len(self._records))]
        self._rows = concatenate_datasets([Dataset.from_file(file) for file in files]) if files else None
        table = self._rows.data.table if self._rows is not None else None
        self.ids: tuple[str, ...] = tuple(table.column("sample_id").to_pylist()) if table is not None else ()
        self._places = {key: place for place, key in enumerate(self.ids)}
        self._arrow = self._rows.with_format("arrow") if self._rows is not None else None
        self._verdicts: dict[str, dict[str, tuple[bool, float]]] = {}
        for file in sorted((self.path / "verdicts").glob("[!.]*.arrow")):
            columns = Dataset.from_file(str(file), in_memory=True).data.table.to_pydict()
            pairs = zip(columns["verdict"], columns["score"], strict=True)
            self._verdicts[file.stem] = dict(zip(columns["sample_id"], pairs, strict=True))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Trace:  # type: ignore[override]
        if self._arrow is None or not -len(self) <= index < len(self):
            raise IndexError(f"trace {index} of {len(self)}")
        (row,) = shards.table_rows(self._arrow[index])
        for name, column in self._verdicts.items():
            if row["sample_id"] in column:
                verdict, score = column[row["sample_id"]]
                _put(row, "verdict", name, verdict)
                _put(row, "score", name, score)
        return shards.decode(row, sparse=self.header["gaze_top_k"] is not None)

    def __iter__(self) -> Iterator[Trace]:
        return (self[place] for place in range(len(self)))

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._places

    def get(self, sample_id: str) -> Trace:
        """The trace of a sample; a ``UserError`` names the id and the store where there is none."""
        if sample_id not in self._places:
            raise UserError(f"the trace store '{self.path}' has no trace of sample '{sample_id}' ({len(self)} traces)")
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
        write_bytes(folder / f"{name}.arrow", shards.stream_bytes(rows, shards.VERDICT_FEATURES))
        self._verdicts[name] = column

    def digest(self, verdicts: Sequence[str] = ()) -> str:
        """SHA-256 over the header, all shards, and the named filters' columns: what a run has to note down."""
        total = hashlib.sha256(shards.canonical(self._content))
        for record in self._records:
            total.update(record["sha256"].encode())
        for name in sorted(verdicts):
            column = [(key, *self._column(name)[key]) for key in self.ids if key in self._column(name)]
            total.update(shards.canonical([name, column]))
        return total.hexdigest()

    def bytes_per_sample(self) -> float:
        """Size of the shards on disk over the number of traces."""
        return sum(record["bytes"] for record in self._records) / max(len(self), 1)


def _put(row: Row, kind: str, name: str, value: Any) -> None:
    """Set a named verdict or score of a row; a written column goes before what the trace was stored with."""
    names, values = row[f"{kind}_names"], row[f"{kind}_values"]
    if name in names:
        values[names.index(name)] = value
    else:
        names.append(name)
        values.append(value)


def _complete_header(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header as JSON will give it back, with the storage settings filled in and checked."""
    try:
        full = json.loads(json.dumps({"gaze_top_k": None, "semantics_dtype": "float32", **header}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"the header of a trace store is plain JSON data: {error}") from error
    k, dtype = full["gaze_top_k"], full["semantics_dtype"]
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise UserError(f"gaze_top_k is a whole number of at least 1 or none, got {k!r}")
    if dtype not in SEMANTICS_DTYPES:
        raise UserError(f"semantics_dtype is {dtype!r}; {nearest(str(dtype), SEMANTICS_DTYPES)}")
    return full
