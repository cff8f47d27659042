"""Who extracts what: samples cut into shards, shards dealt out to processes, and which of them are done.

A shard is the unit of work, of resuming and of distribution. Its bytes depend on its samples, the settings and the
teacher alone, so that any split of the work leaves the same store.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from laavit.files import TEMPORARY
from laavit.registry import UserError
from laavit.traces import shards
from laavit.traces.shards import Header, Record

logger = logging.getLogger(__name__)

#: where the data lie may differ between machines; what they are is in their hash
PLACES = ("annotations", "root")


@dataclass(frozen=True)
class Share:
    """Which shards a process takes: those of its part (array jobs, independent of each other), split among its ranks.

    Args:
        part, parts: this job's place among the parts. rank, ranks: this process's place in the job (torchrun).
    """

    part: int = 0
    parts: int = 1
    rank: int = 0
    ranks: int = 1

    @classmethod
    def of(cls, part: str | None = None) -> Share:
        """From ``--part i/n`` (i from 1) and torchrun's RANK and WORLD_SIZE.

        Raises:
            UserError: ``part`` is no such fraction, or the environment is not torchrun's.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", part or "1/1")
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--part is i/n with i from 1 to n, for example 2/3, got '{part}'")
        rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks)):
            raise UserError(
                f"the environment's RANK is '{rank}' and WORLD_SIZE '{ranks}'; allowed: a rank below the size"
            )
        return cls(int(found[1]) - 1, int(found[2]), int(rank), int(ranks))

    def scope(self, count: int) -> list[int]:
        """The part's shards of ``count``: the rank's own first, then the other ranks' from the end, to help out."""
        every = range(self.part, count, self.parts)
        own = every[self.rank :: self.ranks]
        return [*own, *sorted(set(every) - set(own), reverse=True)]


class Plan:
    """A store's shards: which samples belong to each, which are done, and who may write one.

    Args:
        folder: the store's. ids: all samples', in order. header: what the store says of itself.

    Attributes:
        header: the store's. ids: all samples', in order.
    """

    def __init__(self, folder: Path, ids: Sequence[str], header: Header) -> None:
        self.folder, self.ids, self.header = folder, ids, header

    @classmethod
    def open(cls, folder: Path, ids: Sequence[str], content: Mapping[str, Any], shard_size: int) -> Plan:
        """Begin a store, or go on with one that was begun with the same settings and samples, or fewer of them.

        Args:
            content: the header's: teacher, settings, versions, ``data``.

        Raises:
            UserError: the folder holds something else, or a store of other settings or samples; it names what differs.
        """
        if folder.exists() and not folder.is_dir():
            raise UserError(f"the trace store's place '{folder}' is a file")
        known: dict[str, int] = {}
        for place, key in enumerate(ids):
            if known.setdefault(key, place) != place:
                raise UserError(f"samples {known[key]} and {place} have the same id '{key}'")
        wanted = Header(shard_size, len(ids), shards.ids_digest(ids), shards.complete_header(content))
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".header.lock"):
            found = shards.read_header(folder)
            if found is None:
                others = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
                if others:
                    raise UserError(f"'{folder}' is no trace store and not empty (it holds '{others[0]}')")
            elif not _outgrown(folder, found, wanted, ids):
                return cls(folder, ids, found)
            shards.write_header(folder, wanted)
        return cls(folder, ids, wanted)

    def samples(self, index: int) -> range:
        """The places of a shard's samples."""
        size = self.header.shard_size
        return range(index * size, min((index + 1) * size, len(self.ids)))

    def digest(self, index: int) -> str:
        """What the record of a finished shard says of its samples."""
        places = self.samples(index)
        return shards.ids_digest(self.ids[places.start : places.stop])

    def state(self, index: int, verify: bool = True) -> Record | str:
        """A finished shard's record, or why it has to be done."""
        record = shards.read_record(self.folder, index, verify)
        if isinstance(record, Record) and record.samples != self.digest(index):
            return f"it holds {record.count + len(record.quarantined)} of {len(self.samples(index))} samples"
        return record

    def spool(self, index: int) -> Path:
        """Where the finished batches of an unfinished shard are."""
        return self.folder / f".spool-{index:05d}"

    @contextmanager
    def claim(self, index: int) -> Iterator[bool]:
        """Whether this process alone may write the shard. The claim of a process that dies ends with it."""
        lock = FileLock(self.folder / f".shard-{index:05d}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            for path in self.folder.glob(f"{TEMPORARY}*-{shards.shard_path(self.folder, index).stem}.*"):
                path.unlink()  # of a process that was killed while it wrote
            yield True
        finally:
            lock.release()

    def clean(self, index: int) -> None:
        """Take away what helped to write a finished shard."""
        shutil.rmtree(self.spool(index), ignore_errors=True)
        (self.folder / f".shard-{index:05d}.lock").unlink(missing_ok=True)


def _outgrown(folder: Path, found: Header, wanted: Header, ids: Sequence[str]) -> bool:
    """Whether a store has to be about more samples than it is.

    Raises:
        UserError: the store was begun with other settings, or with samples that are not the first of these.
    """

    def described(header: Header, data: bool) -> dict[str, Any]:
        content = {key: value for key, value in header.content.items() if key != "data"}
        given = dict(header.content.get("data") or {})
        if data:
            content["data"] = {k: v for k, v in given.items() if k not in PLACES or "annotations_sha256" not in given}
        return {"shard_size": header.shard_size, **content}

    grown = found.count < wanted.count and shards.ids_digest(ids[: found.count]) == found.samples
    if parts := shards.differences(described(found, not grown), described(wanted, not grown), subset=False):
        raise UserError(f"the trace store '{folder}' was begun with other settings: {'; '.join(parts)}")
    if grown:
        logger.info("the data grew from %d to %d samples", found.count, wanted.count)
    elif (found.count, found.samples) != (wanted.count, wanted.samples):
        raise UserError(
            f"the trace store '{folder}' is about other samples: {found.count} in the store and {wanted.count} here, "
            f"which differ {_where(folder, found, ids)}"
        )
    return grown


def _where(folder: Path, header: Header, ids: Sequence[str]) -> str:
    size = header.shard_size
    for index in shards.shard_indices(folder):
        record = shards.read_record(folder, index, verify=False)
        part = ids[index * size : (index + 1) * size]
        if isinstance(record, Record) and record.samples != shards.ids_digest(part):
            return f"between number {index * size} and {index * size + size - 1}"
    return "in their ids or their order"
