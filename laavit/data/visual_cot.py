"""Visual-CoT (arXiv 2403.16999) as it is published, read into ``Sample``s.

Two forms of a record, told apart by the number of turns:

* **four turns** (``viscot_363k.json``): ``image: [path, "path###[x1, y1, x2, y2]"]`` with the box in pixels, and
  ``conversations``: the question with a request for the box, the normalised box as text, ``<image>``, the answer.
* **two turns** (as LVR and its successors write it): ``image: [path]`` or a string, the question, and
  ``<answer> ... </answer>`` (other text of that turn, for example ``<lvr>``, is dropped); ``bboxes``, where given, are
  normalised.

Keys that are not part of the format are kept in ``Sample.meta``. The requests in a question ("Please provide the
bounding box ...", "Provide a short and direct response.") belong to the other methods' prompts and are taken off.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from PIL import Image, UnidentifiedImageError

from laavit.registry import DATASETS, UserError, nearest
from laavit.structures import Box, Sample

logger = logging.getLogger(__name__)

#: How far a coordinate may reach past the image, as a share of its side: 871 published boxes overshoot by rounding.
OVERSHOOT = 0.01

_REQUESTS = re.compile(
    r"\s*(please provide the bounding box coordinates? of the region that can help you answer the question better\.?"
    r"|provide a short and direct response\.?)\s*$",
    re.IGNORECASE,
)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_DRIVE = re.compile(r"[A-Za-z]:")
_SEPARATOR = re.compile(r"[/\\]")
_BOX = re.compile(r"\[([^\[\]]*)\]")
_FORMAT_KEYS = {"dataset", "split", "question_id", "id", "image", "conversations", "bboxes"}

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class _Record:
    """A checked record; ``boxes`` are normalised, ``pixels`` wait for the image's size."""

    where: str
    key: str
    images: tuple[str, ...]
    question: str
    answer: str
    boxes: tuple[Box, ...]
    pixels: tuple[tuple[int, Corners], ...]
    source: str
    split: str
    meta: Mapping[str, Any]


@DATASETS.register_module()
class VisualCoT(Sequence[Sample]):
    """Samples of a Visual-CoT JSON file, in the file's order.

    The whole file is checked when it is opened; images are looked at (existence, and the header where a box is given
    in pixels only) when a sample is asked for, or all at once by ``check()``.

    An id is ``question_id`` as text; where that is not unique in the file, every id is ``dataset-question_id``, and
    where that is not either, ``dataset-split-question_id``. It does not depend on ``split`` or ``limit``.

    Args:
        annotations: the JSON file, a list of records.
        root: the folder that the records' image paths are relative to; nothing outside it is ever opened.
        split: only records of this split; ``None`` takes all.
        limit: at most this many samples, from the start.

    Raises:
        UserError: the file, a record, or an argument is not as described; the sentence names the record.
    """

    def __init__(
        self, annotations: str | Path, root: str | Path, split: str | None = None, limit: int | None = None
    ) -> None:
        self.annotations, self.root = Path(annotations), Path(root)
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise UserError(f"limit is a whole number of at least 1 or none, got {limit!r}")
        if not self.root.is_dir():
            raise UserError(f"the image folder '{self.root}' does not exist or is no folder")
        self._real_root = self.root.resolve()
        records = [_parse(item, f"record {i} of '{self.annotations}'") for i, item in enumerate(self._load())]
        keys = _unique_ids(records)
        if split is not None:
            known = {record.split for record in records}
            if split not in known:
                raise UserError(f"'{self.annotations}' has no split '{split}'; {nearest(split, known)}")
        chosen = [(key, rec) for key, rec in zip(keys, records, strict=True) if split is None or rec.split == split]
        self._chosen = chosen[:limit]
        self._places = {key: place for place, (key, _) in enumerate(self._chosen)}

    def _load(self) -> list[Any]:
        logger.info("reading %s (about half a minute for the whole of Visual-CoT)", self.annotations)
        try:
            content = json.loads(self.annotations.read_text(encoding="utf-8-sig"))
        except FileNotFoundError as error:
            raise UserError(f"the annotation file '{self.annotations}' does not exist") from error
        except OSError as error:
            raise UserError(f"the annotation file '{self.annotations}' cannot be read: {error.strerror}") from error
        except RecursionError as error:
            raise UserError(f"'{self.annotations}' is nested too deeply for a list of records") from error
        except ValueError as error:  # broken JSON, broken UTF-8, numbers of thousands of digits
            raise UserError(f"'{self.annotations}' is not valid JSON: {error}") from error
        if not isinstance(content, list):
            raise UserError(f"'{self.annotations}' holds {_kind(content)}; allowed: a list of Visual-CoT records")
        if not content:
            raise UserError(f"'{self.annotations}' holds no records")
        return content

    @property
    def ids(self) -> tuple[str, ...]:
        """The samples' ids in order, without touching an image."""
        return tuple(key for key, _ in self._chosen)

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        key, record = self._chosen[index]
        paths = tuple(self._locate(image, record.where) for image in record.images)
        boxes = record.boxes
        if record.pixels:
            sizes = {image: _image_size(paths[image], record.where) for image, _ in record.pixels}
            boxes = tuple(_scaled(corners, image, sizes[image], record.where) for image, corners in record.pixels)
        return Sample(
            id=key,
            images=paths,
            question=record.question,
            answer=record.answer,
            boxes=boxes,
            source=record.source,
            split=record.split,
            meta=record.meta,
        )

    def get(self, sample_id: str) -> Sample:
        """The sample of that id; a ``UserError`` names the id and the file where there is none."""
        if sample_id not in self._places:
            raise UserError(f"'{self.annotations}' has no sample '{sample_id}' among the {len(self)} selected")
        return self[self._places[sample_id]]

    def check(self) -> None:
        """Look at every sample's image files and boxes once, so that a run does not stop at a late one."""
        for index in range(len(self)):
            self[index]

    def _locate(self, image: str, where: str) -> Path:
        # Resolved before it is used, so that what was checked is what is opened.
        path = (self._real_root / image).resolve()
        if not path.is_relative_to(self._real_root):
            raise UserError(f"{where}: the image '{image}' leads out of the image folder '{self.root}'")
        if not path.is_file():
            raise UserError(f"{where}: there is no image '{image}' in '{self.root}'")
        return path


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"


def _parse(item: Any, where: str) -> _Record:
    """Check one record; every error names it."""
    if not isinstance(item, dict):
        raise UserError(f"{where} is {_kind(item)}; allowed: an object with 'image' and 'conversations'")
    identity = item.get("question_id", item.get("id"))
    if isinstance(identity, bool) or not isinstance(identity, (int, str)) or not str(identity).strip():
        raise UserError(f"{where}: 'question_id' is {identity!r}; allowed: a whole number or a text")
    where = f"{where} (question_id {identity})"
    for key in ("dataset", "split"):
        if not isinstance(item.get(key, ""), str):
            raise UserError(f"{where}: '{key}' is {_kind(item[key])}; allowed: a text")
    images, pixels = _parse_images(item.get("image"), where)
    question, answer, written = _parse_turns(item.get("conversations"), where)
    listed = item.get("bboxes")
    if listed is not None:
        if not isinstance(listed, list):
            raise UserError(f"{where}: 'bboxes' is {_kind(listed)}; allowed: a list of [x1, y1, x2, y2]")
        written = [_corners(box, where, texts=False) for box in listed]
    boxes = _assign(written, pixels, len(images), where)
    return _Record(
        where=where,
        key=str(identity).strip(),
        images=images,
        question=question,
        answer=answer,
        boxes=boxes,
        pixels=() if boxes else tuple(pixels),
        source=item.get("dataset", ""),
        split=item.get("split", "train"),
        meta={key: value for key, value in item.items() if key not in _FORMAT_KEYS},
    )


def _parse_images(value: Any, where: str) -> tuple[tuple[str, ...], list[tuple[int, Corners]]]:
    """``image`` -> the distinct paths in order, and the pixel boxes with the index of the image they are on."""
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, str) for entry in entries):
        raise UserError(
            f"{where}: 'image' is {value!r}; allowed: a path, or a list of paths and 'path###[x1, y1, x2, y2]'"
        )
    paths: list[str] = []
    pixels: list[tuple[int, Corners]] = []
    for entry in entries:
        path, mark, text = entry.partition("###")
        if path not in paths:
            _check_path(path, where)
            paths.append(path)
        if mark:
            found = _BOX.fullmatch(text.strip())
            if found is None:
                raise UserError(f"{where}: the box '{text}' of the image '{path}' is not of the form [x1, y1, x2, y2]")
            pixels.append((paths.index(path), _corners(found[1].split(","), where)))
    return tuple(paths), pixels


def _check_path(path: str, where: str) -> None:
    if not path.strip() or "\0" in path:
        raise UserError(f"{where}: an image path is empty or holds a null character")
    # Both systems' spellings are refused on both; plain text, since pathlib would double the time to open the file.
    if path[0] in "/\\" or _DRIVE.match(path) or ".." in _SEPARATOR.split(path):
        raise UserError(f"{where}: the image path '{path}' is absolute or holds '..'; allowed: a path below the root")


def _parse_turns(turns: Any, where: str) -> tuple[str, str, list[Corners]]:
    """``conversations`` -> question, answer, normalised boxes (none in the short form)."""
    if not isinstance(turns, list) or len(turns) not in (2, 4):
        given = f"{len(turns)} turns" if isinstance(turns, list) else _kind(turns)
        raise UserError(f"{where}: 'conversations' has {given}; allowed: a list of 4 turns or of 2")
    values = []
    for place, turn in enumerate(turns):
        speaker = ("human", "gpt")[place % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise UserError(
                f"{where}: turn {place + 1} is not an object with 'from': '{speaker}' and a text as 'value'"
            )
        values.append(turn["value"])
    question = values[0].replace("<image>", " ").strip()
    while (shorter := _REQUESTS.sub("", question)) != question:
        question = shorter
    if not question:
        raise UserError(f"{where}: the question is empty")
    tagged = _ANSWER.findall(values[-1])
    answer = (tagged[-1] if tagged else values[-1]).strip()
    if not answer:
        raise UserError(f"{where}: the answer is empty")
    if len(values) == 2:
        return question, answer, []
    found = _BOX.findall(values[1])
    if not found:
        raise UserError(f"{where}: the second turn '{values[1][:60]}' holds no box [x1, y1, x2, y2]")
    return question, answer, [_corners(text.split(","), where) for text in found]


def _corners(values: Any, where: str, texts: bool = True) -> Corners:
    """Four finite numbers, not inverted; ``texts`` allows them to be spelled out."""
    given = f"[{', '.join(map(str, values))}]" if isinstance(values, list) else repr(values)
    refused = bool if texts else (bool, str)
    if not isinstance(values, list) or len(values) != 4 or any(isinstance(value, refused) for value in values):
        raise UserError(f"{where}: the box {given} is not four numbers [x1, y1, x2, y2]")
    try:
        x1, y1, x2, y2 = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: the box {given} is not four numbers [x1, y1, x2, y2]") from error
    if not all(math.isfinite(value) for value in (x1, y1, x2, y2)):
        raise UserError(f"{where}: the box {given} holds a number that is not finite")
    if x1 > x2 or y1 > y2:
        raise UserError(f"{where}: the box {given} is inverted; allowed: x1 < x2 and y1 < y2")
    return x1, y1, x2, y2


def _assign(written: list[Corners], pixels: list[tuple[int, Corners]], images: int, where: str) -> tuple[Box, ...]:
    """Normalised boxes with the image each is on; none where the pixel boxes have to be used instead."""
    if not written:
        return ()
    if pixels and any(x1 == x2 or y1 == y2 for x1, y1, x2, y2 in written):
        return ()  # three decimals can round a thin box flat; its pixels are exact
    if pixels and len(pixels) != len(written):
        raise UserError(f"{where}: {len(written)} normalised boxes stand against {len(pixels)} in pixels")
    if not pixels and images > 1:
        raise UserError(f"{where}: the boxes do not say on which of the {images} images they are")
    places = [image for image, _ in pixels] or [0] * len(written)
    return tuple(_scaled(box, image, (1, 1), where) for box, image in zip(written, places, strict=True))


def _scaled(corners: Corners, image: int, size: tuple[int, int], where: str) -> Box:
    """Corners over the image's size (width, height) -> Box; an overshoot of up to 1 % is clamped."""
    x1, y1, x2, y2 = (value / side for value, side in zip(corners, size * 2, strict=True))
    if min(x1, y1) < -OVERSHOOT or max(x2, y2) > 1 + OVERSHOOT:
        unit = "an image of normalised size 1 x 1" if size == (1, 1) else f"its image of {size[0]} x {size[1]} pixels"
        raise UserError(f"{where}: the box {list(corners)} reaches more than 1 % past {unit}")
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in (x1, y1, x2, y2))
    if x1 >= x2 or y1 >= y2:
        raise UserError(f"{where}: the box {list(corners)} has no area inside its image")
    return Box(x1, y1, x2, y2, image)


def _image_size(path: Path, where: str) -> tuple[int, int]:
    """(width, height) from the file's header; the pixels are not decoded."""
    try:
        with Image.open(path) as image:
            return image.size
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise UserError(f"{where}: the image '{path.name}' cannot be read: {error}") from error


def _unique_ids(records: Sequence[_Record]) -> list[str]:
    """The shortest of three spellings under which all ids of the file differ."""
    spellings = (
        lambda record: record.key,
        lambda record: f"{record.source}-{record.key}",
        lambda record: f"{record.source}-{record.split}-{record.key}",
    )
    keys: list[str] = []
    for spell in spellings:
        keys = [spell(record) for record in records]
        if len(set(keys)) == len(keys):
            return keys
    twice = next(key for key, count in Counter(keys).items() if count > 1)
    first, second = [record.where for record, key in zip(records, keys, strict=True) if key == twice][:2]
    raise UserError(f"two records have the id '{twice}': {first} and {second}")
