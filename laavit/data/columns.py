"""Any Hugging Face data set on disk, by a map of its columns: what ``save_to_disk`` wrote, or a folder of data files.

Images are paths below the root, or bytes in the table (``Image`` features). Bytes are written once into the cache
folder, one file an image under the hash of its content, and samples name those files.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset

from laavit.data import index, streams
from laavit.data.parsing import (
    PIXELS,
    SHARES,
    BadRecord,
    Record,
    check_path,
    keyed,
    kind_of,
    read_corners,
    read_key,
    shown,
)
from laavit.data.records import MAX_CHARACTERS, RecordReader
from laavit.files import write_bytes
from laavit.registry import DATASETS, UserError, nearest

logger = logging.getLogger(__name__)

#: What a map of columns may name; the first three are looked for under their own names where it does not.
FIELDS = ("question", "answer", "image", "id", "boxes", "box_images", "source", "split")
UNITS = (SHARES, PIXELS)
_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".feather": "feather"}
_LINES = (".json", ".jsonl", ".gz")
#: Rows decoded at a time; images are in them.
_ROWS = 32
#: Before the name of a file in the cache folder.
_KEPT = "bytes###"
_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


@DATASETS.register_module()
class Columns(RecordReader):
    """Samples of a table.

    Args:
        annotations: a folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote; or a folder (or one
            file) of Parquet, Arrow or JSON lines.
        root: the folder that image paths are relative to; None where the table holds the images themselves.
        columns: field -> column, for example ``dict(question='query', answer='label', image='image', boxes='bbox')``.
            Fields: question, answer, image (a path, an image, or a list of them), id (default: the row's number),
            boxes (one [x1, y1, x2, y2] or a list of them), box_images (the image each box is on; default: the first),
            source, split (default: the split that the row's file belongs to).
        box_unit: 'share' (of the image's sides) or 'pixel' (of the upright image).
        split: only records of this split; ``None`` takes all.
        limit: at most this many samples, from the start.
        max_characters: a longer question or answer puts its record into quarantine.

    Raises:
        UserError: as ``RecordReader``; or the map names a field or a column that does not exist.
    """

    def __init__(
        self,
        annotations: str | Path,
        root: str | Path | None = None,
        columns: dict[str, str] | None = None,
        box_unit: str = SHARES,
        split: str | None = None,
        limit: int | None = None,
        max_characters: int = MAX_CHARACTERS,
    ) -> None:
        given = dict(columns or {})
        for field in given:
            if field not in FIELDS:
                raise UserError(f"columns: no field is called '{field}'; {nearest(field, FIELDS)}")
        if box_unit not in UNITS:
            raise UserError(f"box_unit: got '{box_unit}'; {nearest(box_unit, UNITS)}")
        self.columns, self.box_unit = {name: name for name in FIELDS[:3]} | given, box_unit
        self._kept = index.cache_folder() / "images"
        self._has_root = root is not None
        if root is None:
            self._kept.mkdir(parents=True, exist_ok=True)
        super().__init__(annotations, self._kept if root is None else root, split, limit, max_characters)

    @classmethod
    def has_boxes(cls, arguments: Mapping[str, Any]) -> bool:
        """Boxes are read where the map names their column."""
        return "boxes" in (arguments.get("columns") or {})

    def sources(self) -> list[Path]:
        """The data files, in order."""
        if not self.annotations.exists():
            raise UserError(f"the data set '{self.annotations}' does not exist")
        if self.annotations.is_file():
            return [self.annotations]
        wanted = (*_FORMATS, *_LINES)
        found = sorted(path for path in self.annotations.rglob("*") if path.suffix in wanted and path.is_file())
        if not any(path.suffix in _FORMATS or path.suffix == ".jsonl" for path in found):
            raise UserError(f"'{self.annotations}' holds no data files; allowed: Parquet, Arrow, JSON lines")
        return found

    def identity(self) -> dict[str, Any]:
        """What else the index depends on."""
        return {**super().identity(), "columns": self.columns, "box_unit": self.box_unit, "root": self._has_root}

    def raw(self) -> Iterator[tuple[str, Any]]:
        """Every row with its place."""
        saved = self.annotations / "dataset_dict.json"
        if saved.is_file() or (self.annotations / "state.json").is_file():
            rows = self._saved(saved)
        else:
            files = [path for path in self.sources() if path.suffix != ".json" or path == self.annotations]
            rows = (row for path in files for row in self._file(path))
        for number, (split, row) in enumerate(rows):
            yield f"row {number}", {**row, "": split} if isinstance(row, dict) else row

    def _saved(self, saved: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """(split, row) of what ``save_to_disk`` wrote; images stay undecoded."""
        import datasets

        try:
            names = json.loads(saved.read_text(encoding="utf-8"))["splits"] if saved.is_file() else [""]
            parts = [(name, datasets.load_from_disk(str(self.annotations / name))) for name in names]
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise UserError(f"'{self.annotations}' does not read as a saved data set: {_line(error)}") from error
        for name, table in parts:
            self._check_columns(table.column_names)
            wanted = table.select_columns(sorted(set(self.columns.values())))
            for column, feature in wanted.features.items():
                inner = getattr(feature, "feature", feature)
                if isinstance(inner, datasets.Image):
                    raw = datasets.Image(decode=False)
                    wanted = wanted.cast_column(column, raw if inner is feature else datasets.List(raw))
            for block in wanted.iter(batch_size=_ROWS):
                for values in zip(*block.values(), strict=True):
                    yield name or str(table.split or "train"), dict(zip(block, values, strict=True))

    def _file(self, path: Path) -> Iterator[tuple[str, Any]]:
        """(split, row) of one data file; its split is what its name begins with, ``train-00000-of-00002.parquet``."""
        split = path.name.split(".")[0].split("-")[0]
        if path.suffix not in _FORMATS:
            for _, value in streams.values(path):
                yield split, value
            return
        try:
            table = pyarrow.dataset.dataset(path, format=_FORMATS[path.suffix])
            self._check_columns(table.schema.names)
            for batch in table.to_batches(columns=sorted(set(self.columns.values())), batch_size=_ROWS):
                for row in batch.to_pylist():
                    yield split, row
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"'{path}' cannot be read: {_line(error)}") from error

    def _check_columns(self, names: list[str]) -> None:
        for field, column in self.columns.items():
            if column not in names:
                raise UserError(
                    f"columns.{field}: '{self.annotations}' has no column '{column}'; {nearest(column, names)}"
                )

    def parse(self, item: Any, place: int) -> list[Record | BadRecord]:
        """One row; see ``RecordReader``."""
        if not isinstance(item, Mapping):
            raise BadRecord(f"format: it is {kind_of(item)}; allowed: an object of columns")
        columns = self.columns
        key = read_key(item, columns["id"]) if "id" in columns else str(place)
        with keyed(key):
            boxes = item.get(columns["boxes"]) if "boxes" in columns else None
            boxes = boxes if boxes is not None else []
            if not isinstance(boxes, list):
                raise BadRecord(f"box: it is {kind_of(boxes)}; allowed: [x1, y1, x2, y2] or a list of them")
            single = bool(boxes) and not any(isinstance(box, list) for box in boxes)
            corners = tuple(read_corners(box) for box in ([boxes] if single else boxes))
            images = self._images(item.get(columns["image"]))
            places = _places(item.get(columns["box_images"]) if "box_images" in columns else None, corners, images)
            return [
                Record(
                    key=key,
                    images=images,
                    question=self._text(item, "question"),
                    answer=self._text(item, "answer"),
                    corners=corners,
                    places=places,
                    unit=self.box_unit,
                    source=self._text(item, "source") if "source" in columns else "",
                    split=self._text(item, "split") if "split" in columns else item[""],
                )
            ]

    def _text(self, item: Mapping[str, Any], field: str) -> str:
        value = item.get(self.columns[field])
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise BadRecord(f"{field}: it is {kind_of(value)}; allowed: a text")
        return str(value).replace("<image>", " ").strip() if field == "question" else str(value).strip()

    def _images(self, value: Any) -> tuple[str, ...]:
        values = value if isinstance(value, list) else [value]
        if not values:
            raise BadRecord("image: the row has none")
        return tuple(self._image(each) for each in values)

    def _image(self, value: Any) -> str:
        """The path of an image, or of the file that its bytes are kept in."""
        if isinstance(value, Mapping):
            content = value.get("bytes")
            value = content if content is not None else value.get("path")
        if isinstance(value, bytes):
            return self._keep(value)
        if not isinstance(value, str):
            raise BadRecord(f"image: it is {kind_of(value)}; allowed: an image, or a path below the root")
        if not self._has_root:
            raise BadRecord(f"image: {shown(value)} is a path, and no root is given")
        if value.startswith(_KEPT):
            raise BadRecord(f"image: {shown(value)} is no path")
        check_path(value)
        return value

    def _keep(self, content: bytes) -> str:
        name = hashlib.sha256(content).hexdigest()
        suffix = next((suffix for magic, suffix in _SUFFIXES.items() if content.startswith(magic)), ".img")
        path = self._kept / name[:2] / f"{name}{suffix}"
        if not path.is_file():
            write_bytes(path, content, sync=False)
        return f"{_KEPT}{name[:2]}/{path.name}"

    def locate(self, image: str, where: str) -> Path:
        """The file of an image path, in the cache folder where its bytes were in the table."""
        if not image.startswith(_KEPT):
            return super().locate(image, where)
        path = (self._kept / image.removeprefix(_KEPT)).resolve()
        if not path.is_file():
            raise UserError(f"{where}: its image is gone from '{self._kept}'; remove '{self._folder}' to write it anew")
        return path


def _places(value: Any, corners: tuple[Any, ...], images: tuple[str, ...]) -> tuple[int, ...]:
    """The image that each box is on."""
    if value is None:
        if corners and len(images) > 1:
            raise BadRecord(f"box: they do not say on which of the {len(images)} images they are")
        return (0,) * len(corners)
    values = value if isinstance(value, list) else [value]
    if len(values) != len(corners) or not all(type(each) is int and 0 <= each < len(images) for each in values):
        raise BadRecord(
            f"box: {shown(value)} does not name one of {len(images)} images for each of {len(corners)} boxes"
        )
    return tuple(values)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
