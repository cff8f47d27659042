"""The base of every reader: records streamed once into an Arrow index, bad ones in quarantine, samples on demand.

Three moments, and what each of them refuses:

* **Opening** reads the annotations. A record that is not as the format says is *quarantined* with a reason, logged
  once and left out; a file that is broken as a whole, or holds no good record, is a ``UserError``. No image is touched.
* **Asking for a sample** (``reader[i]``, ``reader.get(id)``) looks at its image files: one that is missing or leads out
  of the root, or pixel boxes that do not fit it, is a ``UserError`` that names the record.
* **Checking**: ``check()`` asks for every sample and raises for the first bad one (training, where a missing file must
  stop a run before it begins); ``broken()`` gives every bad one with its reason and raises nothing (extraction, which
  puts them in quarantine, and ``laavit data check``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import Progress

from laavit.data import index, streams
from laavit.data.index import Quarantined
from laavit.data.parsing import PIXELS, BadRecord, Corners, Record, checked_boxes, to_box
from laavit.images import image_size
from laavit.registry import UserError, nearest
from laavit.structures import Sample

logger = logging.getLogger(__name__)

#: The longest question or answer by default, in characters: a longer one is a broken record in all published sets.
MAX_CHARACTERS = 20_000

#: Bytes from which on reading shows a bar.
LONG = 1 << 24

#: Records turned into Python objects at a time where all are asked for.
BLOCK = 1024


class RecordReader(Sequence[Sample]):
    """Samples of annotations on disk, in the file's order, without those in quarantine.

    A subclass parses one value of the file into records (``parse``). Ids do not depend on ``split`` or ``limit``: see
    ``laavit.data.identity``. Readers can be pickled and forked; the index is memory-mapped by each process.

    Args:
        annotations: the file: a JSON list or JSON lines, plain or gzipped.
        root: the folder that the records' image paths are relative to; nothing outside it is ever opened.
        split: only records of this split; ``None`` takes all.
        limit: at most this many samples, from the start.
        max_characters: a longer question or answer puts its record into quarantine.

    Raises:
        UserError: an argument is not as described, the file is broken as a whole, or it holds no good record.
    """

    #: Raised whenever the subclass reads the same file differently.
    version: ClassVar[int] = 1
    #: The key under which an object at the top holds the records, where the format has one.
    wrapper: ClassVar[str | None] = None
    #: What messages call a record's id, and whether records may share one (then they are numbered).
    key_name: ClassVar[str] = "id"
    numbered: ClassVar[bool] = False

    @classmethod
    def has_boxes(cls, arguments: Mapping[str, Any]) -> bool:
        """Whether samples can have boxes, by the reader's arguments alone."""
        return True

    def __init__(
        self,
        annotations: str | Path,
        root: str | Path,
        split: str | None = None,
        limit: int | None = None,
        max_characters: int = MAX_CHARACTERS,
    ) -> None:
        self.annotations, self.root, self.max_characters = Path(annotations), Path(root), max_characters
        for name, value in (("limit", limit), ("max_characters", max_characters)):
            none = " or none" if name == "limit" else ""
            if not (value is None and none) and (type(value) is not int or value < 1):
                raise UserError(f"{name} is a whole number of at least 1{none}, got {value!r}")
        if not self.root.is_dir():
            raise UserError(f"the image folder '{self.root}' does not exist or is no folder")
        self._real_root = self.root.resolve()
        opened = index.open_index(self.sources(), self.identity(), self.entries, self.numbered)
        self._folder, self._opened = opened.folder, opened
        self._rows, self._ids = self._choose(split, limit)
        self._places: dict[str, int] | None = None

    def sources(self) -> list[Path]:
        """The files that are read."""
        return [self.annotations]

    def identity(self) -> dict[str, Any]:
        """What else the index depends on."""
        cls = type(self)
        return {
            "reader": cls.__name__,
            "module": cls.__module__,
            "version": self.version,
            "max_characters": self.max_characters,
        }

    def parse(self, item: Any, place: int) -> Iterable[Record | BadRecord]:
        """One value of the file in normal form.

        Args:
            place: its number in the file, from 0.

        Raises:
            BadRecord: it is not as the format says.
        """
        raise TypeError(f"{type(self).__name__} must define parse(item, place)")

    def raw(self) -> Iterator[tuple[str, Any]]:
        """Every value of the source with its place, in order."""
        size = self.annotations.stat().st_size
        if size < LONG:
            yield from streams.values(self.annotations, self.wrapper)
            return
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"reading {self.annotations.name}", total=size)
            yield from streams.values(
                self.annotations, self.wrapper, lambda position: bar.update(task, completed=position)
            )

    def entries(self) -> Iterator[index.Entry]:
        """What the source holds: (place, record), or the quarantined, in order."""
        logger.info("reading %s; its index is kept in %s", self.annotations, index.cache_folder())
        good, place, first = False, -1, None
        for place, (where, value) in enumerate(self.raw()):
            for entry in self._parsed(value, place, where):
                good = good or type(entry) is tuple
                first = first or (entry if isinstance(entry, Quarantined) else None)
                yield entry
        if place < 0:
            raise UserError(f"'{self.annotations}' holds no records")
        if not good:
            said = f"{first.where}: {first.reason}" if first else "none holds a sample"
            raise UserError(f"'{self.annotations}' holds no good record among {place + 1}; {said}")

    def _parsed(self, value: Any, place: int, where: str) -> Iterator[index.Entry]:
        if isinstance(value, streams.Broken):
            yield Quarantined(where, "", f"format: it is not valid JSON: {value.reason}")
            return
        key = ""
        try:
            for record in self.parse(value, place):
                if isinstance(record, BadRecord):
                    yield Quarantined(where, _clean(record.key), _clean(record.reason))
                    continue
                key = record.key
                yield where, checked_boxes(record, self.max_characters)
        except BadRecord as bad:
            yield Quarantined(where, _clean(bad.key or key), _clean(bad.reason))
        except RecursionError:
            yield Quarantined(where, _clean(key), "format: it is nested too deeply")

    def _choose(self, split: str | None, limit: int | None) -> tuple[np.ndarray, pa.ChunkedArray]:
        """Rows and ids of the samples of a split, ``limit`` at most."""
        samples = self._opened.samples
        rows = samples["row"].to_numpy()
        chosen = slice(None, limit)
        ids = samples["id"]
        if split is not None:
            splits = self._opened.records["split"]
            known = pc.unique(splits).to_pylist()
            if split not in known:
                raise UserError(f"'{self.annotations}' has no split '{split}'; {nearest(split, known)}")
            of_split = pc.equal(splits, split).to_numpy()[rows]
            ids, rows = ids.filter(pa.array(of_split)), rows[of_split]
        refused = len(self._opened.quarantined)
        if refused:
            counts = ", ".join(f"{kind} {count}" for kind, count in index.kinds(self._opened.quarantined).items())
            logger.warning("%s: %d records are in quarantine (%s)", self.annotations, refused, counts)
        return rows[chosen], ids[chosen]

    @property
    def _index(self) -> index.Index:
        if self._opened is None:
            self._opened = index.reopen(self._folder)
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        # A mapped table would be copied into the pickle; a worker maps it again.
        return {**self.__dict__, "_opened": None, "_places": None}

    @property
    def quarantined(self) -> Sequence[Quarantined]:
        """What was left out of the whole file, whatever ``split`` and ``limit`` say."""
        table = self._index.quarantined
        return [Quarantined(**each) for each in table.to_pylist()]

    @property
    def read(self) -> int:
        """How many samples the whole file holds, and how many records are in quarantine, together."""
        return len(self._index.samples) + len(self._index.quarantined)

    def table(self, *columns: str) -> pa.Table:
        """Columns of ``index.RECORDS`` of the samples, in order, without touching an image."""
        return self._index.records.select(columns).take(pa.array(self._rows))

    @property
    def ids(self) -> tuple[str, ...]:
        """The samples' ids in order, without touching an image."""
        return tuple(self._ids.to_pylist())

    def sources_by_id(self) -> dict[str, str]:
        """Every sample's source set, without touching an image."""
        return dict(zip(self.ids, self.table("source")["source"].to_pylist(), strict=True))

    @property
    def image_keys(self) -> list[tuple[str, ...]]:
        """The samples' image paths as they are written, in order, without touching an image (to group by image)."""
        return [tuple(each) for each in self.table("images")["images"].to_pylist()]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._sample(self._ids[index].as_py(), self.describe(index))

    def describe(self, index: int) -> dict[str, Any]:
        """What the index holds of a sample, without a look at its image files: the columns of ``index.RECORDS``."""
        return self._index.records.slice(int(self._rows[index]), 1).to_pylist()[0]

    def _found(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(id, record) of every sample in order, a block at a time."""
        for start in range(0, len(self), BLOCK):
            rows = pa.array(self._rows[start : start + BLOCK])
            ids = self._ids.slice(start, BLOCK).to_pylist()
            yield from zip(ids, self._index.records.take(rows).to_pylist(), strict=True)

    def __iter__(self) -> Iterator[Sample]:
        return (self._sample(*found) for found in self._found())

    def _sample(self, sample_id: str, found: dict[str, Any]) -> Sample:
        where = f"{found['where']} of '{self.annotations}' ({self.key_name} {found['key']})"
        paths = tuple(self.locate(image, where) for image in found["images"])
        flat = found["corners"]
        corners: list[Corners] = [tuple(flat[i : i + 4]) for i in range(0, len(flat), 4)]
        try:
            sizes = {i: image_size(paths[i]) for i in set(found["places"])} if found["unit"] == PIXELS else {}
            boxes = tuple(to_box(each, i, sizes.get(i)) for each, i in zip(corners, found["places"], strict=True))
        except (BadRecord, UserError) as error:
            raise UserError(f"{where}: {error}") from None
        return Sample(
            id=sample_id,
            images=paths,
            question=found["question"],
            answer=found["answer"],
            boxes=boxes,
            source=found["source"],
            split=found["split"],
            meta=json.loads(found["meta"]) if found["meta"] else {},
        )

    def locate(self, image: str, where: str) -> Path:
        """The file of an image path; resolved before it is used, so that what was checked is what is opened."""
        try:
            path = (self._real_root / image).resolve()
            inside, there = path.is_relative_to(self._real_root), path.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a name that is too long
            raise UserError(f"{where}: the image '{image}' cannot be found: {error}") from None
        if not inside:
            raise UserError(f"{where}: the image '{image}' leads out of the image folder '{self.root}'")
        if not there:
            raise UserError(f"{where}: there is no image '{image}' in '{self.root}'")
        return path

    def get(self, sample_id: str) -> Sample:
        """The sample of that id; a ``UserError`` names the id and the file where there is none."""
        if self._places is None:
            self._places = {key: place for place, key in enumerate(self.ids)}
        if sample_id not in self._places:
            raise UserError(f"'{self.annotations}' has no sample '{sample_id}' among the {len(self)} selected")
        return self[self._places[sample_id]]

    def broken(self) -> Iterator[tuple[str, str]]:
        """(id, reason) of every sample whose image files or pixel boxes are not as they must be."""
        with Progress(console=Console(stderr=True), transient=True) as bar:
            words = f"images of {self.annotations.name}"
            for sample_id, found in bar.track(self._found(), total=len(self), description=words):
                try:
                    self._sample(sample_id, found)
                except UserError as error:
                    yield sample_id, str(error)

    def check(self) -> None:
        """Look at every sample's image files and boxes once, so that a run does not stop at a late one.

        Raises:
            UserError: the first sample that is not as it must be.
        """
        for _, reason in self.broken():
            raise UserError(reason)


def _clean(text: str) -> str:
    """Text that Arrow takes: lone surrogates are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()
