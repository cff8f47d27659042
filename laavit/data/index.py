"""A data set's records in normal form, on disk as Arrow: written once a file, memory-mapped ever after.

An index lies in ``LAAVIT_CACHE`` (``~/.cache/laavit`` by default), under what it depends on: the reader's class, its
version and the settings that change what is read, and the source file by path, size, times of change and inode. Not by
a hash of its bytes: that would read 350 MB at every opening, and what the file system says of a file changes with every
write. Only where the file was written less than two seconds before it was read could a second write leave all of that
equal; such an index also keeps the bytes' hash, and is checked by it.

    records.arrow     one row a record: key, images, question, answer, boxes, source, split, meta, its place
    samples.arrow     one row a sample: its id and its record's row (duplicates are left out)
    quarantine.arrow  what was refused: place, id, reason
    index.json        what it was made from
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from laavit.data.identity import identify
from laavit.data.parsing import Record
from laavit.files import TEMPORARY, read_object, remove_leftovers, write_json
from laavit.registry import UserError

logger = logging.getLogger(__name__)

#: The layout below; a change makes older indexes unfit.
VERSION = 1
#: Rows held in memory while an index is written.
ROWS = 2048
#: Seconds between a write and the reading of a file within which its times alone are not trusted.
RACY = 2.0

RECORDS = pa.schema(
    {
        "key": pa.string(),
        "images": pa.list_(pa.string()),
        "question": pa.string(),
        "answer": pa.string(),
        "corners": pa.list_(pa.float64()),  # x1, y1, x2, y2, x1, ...
        "places": pa.list_(pa.int32()),
        "unit": pa.string(),
        "source": pa.string(),
        "split": pa.string(),
        "meta": pa.string(),  # JSON, '' for none
        "where": pa.string(),
    }
)
REFUSED = pa.schema({"where": pa.string(), "id": pa.string(), "reason": pa.string()})
SAMPLES = pa.schema({"id": pa.string(), "row": pa.int64()})


class Quarantined(NamedTuple):
    """A record that is no sample: its place in the file, its id as far as it could be read, and why ('kind: ...')."""

    where: str
    id: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason's kind: 'box', 'question', 'duplicate', ..."""
        return self.reason.partition(":")[0]


Entry = tuple[str, Record] | Quarantined


class Index(NamedTuple):
    """An opened index; the tables are memory-mapped."""

    folder: Path
    records: pa.Table
    samples: pa.Table
    quarantined: pa.Table


def cache_folder() -> Path:
    """Where indexes are kept: ``LAAVIT_CACHE``, or ``~/.cache/laavit``."""
    return Path(os.environ.get("LAAVIT_CACHE") or Path.home() / ".cache" / "laavit")


def open_index(
    sources: Sequence[Path],
    identity: Mapping[str, Any],
    entries: Callable[[], Iterable[Entry]],
    numbered: bool = False,
) -> Index:
    """The index of ``sources``, written first where there is none that fits.

    Args:
        sources: the files read. identity: the reader's class, version and the settings that change what is read.
        entries: what reads them: good records with their place, and refused ones, in order.
        numbered: as ``identify`` takes it.

    Raises:
        UserError: what ``entries`` raises; or the cache folder cannot be written, or a file changed while it was read.
    """
    name = _digest({**identity, "layout": VERSION, "paths": [str(path.resolve()) for path in sources]})
    folder = cache_folder() / "data" / f"{identity['reader']}-{name[:16]}"
    found = _fitting(folder / _digest(_stamp(sources))[:16])
    if found is not None:  # without the lock: the cache may be one that cannot be written
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # the processes of one run open together: one writes, the others wait
            stamp = _stamp(sources)
            done = folder / _digest(stamp)[:16]
            found = _fitting(done, sources)
            if found is None:
                _write(done, sources, stamp, entries(), numbered)
                found = reopen(done)
    except OSError as error:
        raise UserError(
            f"the index of '{sources[0]}' cannot be kept in '{folder}' ({error.strerror or error}); "
            "set LAAVIT_CACHE to a folder that can be written"
        ) from error
    return found


def reopen(folder: Path) -> Index:
    """The index in a folder, mapped (again)."""
    return Index(folder, *(_map(folder / f"{table}.arrow") for table in ("records", "samples", "quarantine")))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _stamp(sources: Sequence[Path]) -> list[list[int]]:
    try:
        found = [path.stat() for path in sources]
    except FileNotFoundError as error:
        raise UserError(f"the annotation file '{error.filename}' does not exist") from error
    except OSError as error:
        raise UserError(f"the annotation file '{error.filename}' cannot be read: {error.strerror}") from error
    return [[each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino] for each in found]


def _content(sources: Sequence[Path]) -> str:
    """SHA-256 over the bytes of all sources."""
    digest = hashlib.sha256()
    for path in sources:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _fitting(done: Path, sources: Sequence[Path] | None = None) -> Index | None:
    """The index in a folder, where it is whole and of the files' present state.

    Args:
        sources: what an index is compared with that was written too soon after its files; None: it does not fit then.
    """
    try:
        head = read_object(done / "index.json")
        if not head or (head["content"] is not None and (sources is None or head["content"] != _content(sources))):
            return None
        if head["content"] is not None:
            write_json(done / "index.json", {**head, "content": None})  # its files are old enough now
        return reopen(done)
    except (pa.ArrowInvalid, FileNotFoundError, KeyError, UserError) as error:  # a power cut, or someone's hands
        logger.warning("the index in %s is damaged (%s) and is written anew", done, error)
        return None


def _write(
    done: Path, sources: Sequence[Path], stamp: list[list[int]], entries: Iterable[Entry], numbered: bool
) -> None:
    """Write the index beside, then give it its name; indexes of the files' former states go."""
    began = time.time()
    remove_leftovers(done.parent)
    beside = done.parent / f"{TEMPORARY}{os.getpid()}"
    beside.mkdir()
    try:
        _write_records(beside, entries)
        _write_samples(beside, numbered)
        if _stamp(sources) != stamp:
            raise UserError(f"'{sources[0]}' changed while it was read")
        fresh = any(max(mtime, ctime) / 1e9 > began - RACY for _, mtime, ctime, _ in stamp)
        write_json(
            beside / "index.json",
            {"paths": [str(path) for path in sources], "content": _content(sources) if fresh else None},
        )
        for former in done.parent.iterdir():
            if former.is_dir() and former != beside:
                shutil.rmtree(former)  # who has it mapped keeps it
        beside.rename(done)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Records make no cycles; the collector would walk all of torch hundreds of times, for half of the time to read."""
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if active:
            gc.enable()


def _write_records(folder: Path, entries: Iterable[Entry]) -> None:
    """Stream entries into two files, ``ROWS`` at a time."""
    with (
        _no_collection(),
        pa.ipc.new_file(folder / "records.arrow", RECORDS) as good,
        pa.ipc.new_file(folder / "refused.arrow", REFUSED) as bad,
    ):
        stream = iter(entries)
        while block := list(islice(stream, ROWS)):
            refused = [entry for entry in block if type(entry) is Quarantined]
            rows = [_row(*entry) for entry in block if type(entry) is not Quarantined]  # type: ignore[misc]
            for writer, schema, found in ((good, RECORDS, rows), (bad, REFUSED, refused)):
                if found:
                    columns = [pa.array(column, field.type) for column, field in zip(zip(*found), schema, strict=True)]
                    writer.write_batch(pa.record_batch(columns, schema=schema))


def _row(where: str, record: Record) -> tuple[Any, ...]:
    key, images, question, answer, corners, places, unit, source, split, meta = record
    flat = [value for box in corners for value in box]
    text = json.dumps(meta, ensure_ascii=True) if meta else ""
    return key, images, question, answer, flat, places, unit, source, split, text, where


def _write_samples(folder: Path, numbered: bool) -> None:
    """Work out the ids, and put the records that are one too many into quarantine."""
    records, refused = _map(folder / "records.arrow"), _map(folder / "refused.arrow")
    ids, rows, doubled = identify(records, numbered)
    with pa.ipc.new_file(folder / "samples.arrow", SAMPLES) as file:
        file.write_table(pa.table([ids, rows], schema=SAMPLES))
    if doubled:
        columns = [pa.array(column, pa.string()) for column in zip(*doubled, strict=True)]
        refused = pa.concat_tables([refused, pa.table(columns, schema=REFUSED)])
    with pa.ipc.new_file(folder / "quarantine.arrow", REFUSED) as file:
        file.write_table(refused.combine_chunks())
    (folder / "refused.arrow").unlink()


def _map(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def kinds(quarantined: pa.Table) -> dict[str, int]:
    """How many records were refused, by kind of reason, the most first."""
    first = pc.list_element(pc.split_pattern(quarantined["reason"], ":", max_splits=1), 0)
    counts = {each["values"]: each["counts"] for each in pc.value_counts(first).to_pylist()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
