"""Visual-CoT (arXiv 2403.16999) as it is published.

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

import re
from typing import Any

from laavit.data.parsing import (
    PIXELS,
    SHARES,
    BadRecord,
    Corners,
    Record,
    check_path,
    keyed,
    kind_of,
    read_corners,
    read_key,
    read_text,
    shown,
    spelled_corners,
)
from laavit.data.records import RecordReader
from laavit.registry import DATASETS

_REQUESTS = (
    "please provide the bounding box coordinate of the region that can help you answer the question better",
    "please provide the bounding box coordinates of the region that can help you answer the question better",
    "provide a short and direct response",
)
_LONGEST = max(map(len, _REQUESTS)) + 1
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_BOX = re.compile(r"\[([^\[\]]*)\]")
_FORMAT_KEYS = frozenset({"dataset", "split", "question_id", "id", "image", "conversations", "bboxes"})
_SPEAKERS = ["human", "gpt"]


@DATASETS.register_module()
class VisualCoT(RecordReader):
    """Samples of a Visual-CoT file, in the file's order.

    Boxes may be missing. Where a record has its boxes normalised and in pixels, the normalised ones are used, but where
    three decimals round one of them flat. Pixels are of the upright image, as ``laavit.images`` shows it. An id is
    ``question_id`` as text, with ``dataset`` and ``split`` before it where that is not unique in the file.

    Args:
        annotations: the file: a JSON list or JSON lines, plain or gzipped.
        root: the folder that the records' image paths are relative to; nothing outside it is ever opened.
        split: only records of this split; ``None`` takes all.
        limit: at most this many samples, from the start.
        max_characters: a longer question or answer puts its record into quarantine.
    """

    key_name = "question_id"

    def parse(self, item: Any, place: int) -> list[Record | BadRecord]:
        """One record; see ``RecordReader``."""
        if not isinstance(item, dict):
            raise BadRecord(f"format: it is {kind_of(item)}; allowed: an object with 'image' and 'conversations'")
        key = read_key(item, "question_id", "id")
        with keyed(key):
            return [_record(key, item)]


def _record(key: str, item: dict[str, Any]) -> Record:
    images, pixels, on = _images(item.get("image"))
    question, answer, written = _turns(item.get("conversations"))
    listed = item.get("bboxes")
    if listed is not None:
        if not isinstance(listed, list):
            raise BadRecord(f"box: 'bboxes' is {kind_of(listed)}; allowed: a list of [x1, y1, x2, y2]")
        written = [read_corners(box) for box in listed]
    corners, places, unit = _boxes(written, pixels, on, len(images))
    meta = {} if item.keys() <= _FORMAT_KEYS else {k: v for k, v in item.items() if k not in _FORMAT_KEYS}
    source, split = read_text(item, "dataset"), read_text(item, "split", "train")
    return Record(key, images, question, answer, corners, places, unit, source, split, meta)


def _images(value: Any) -> tuple[tuple[str, ...], list[Corners], list[int]]:
    """``image`` -> the distinct paths in order, the pixel boxes, and the image that each of those is on."""
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not entries:
        raise BadRecord(
            f"image: it is {shown(value)}; allowed: a path, or a list of paths and 'path###[x1, y1, x2, y2]'"
        )
    paths: list[str] = []
    pixels: list[Corners] = []
    on: list[int] = []
    for entry in entries:
        if not isinstance(entry, str):
            raise BadRecord(f"image: it holds {kind_of(entry)}; allowed: paths and 'path###[x1, y1, x2, y2]'")
        path, mark, text = entry.partition("###")
        if path not in paths:
            check_path(path)
            paths.append(path)
        if mark:
            text = text.strip()
            if not _BOX.fullmatch(text):
                raise BadRecord(f"box: {shown(text)} of the image {shown(path)} is not of the form [x1, y1, x2, y2]")
            pixels.append(spelled_corners(text[1:-1]))
            on.append(paths.index(path))
    return tuple(paths), pixels, on


def _turns(turns: Any) -> tuple[str, str, list[Corners]]:
    """``conversations`` -> question, answer, normalised boxes (none in the short form)."""
    if not isinstance(turns, list) or len(turns) not in (2, 4):
        given = f"{len(turns)} turns" if isinstance(turns, list) else kind_of(turns)
        raise BadRecord(f"conversations: there is {given}; allowed: a list of 4 turns or of 2")
    try:
        speakers, values = [turn["from"] for turn in turns], [turn["value"] for turn in turns]
    except (TypeError, KeyError, IndexError):
        speakers, values = [], []
    if speakers != _SPEAKERS * (len(turns) // 2) or any(map(_is_no_text, values)):
        raise BadRecord(f"conversations: turn {_wrong_turn(turns)}")
    answer = values[-1]
    if "<" in answer and (tagged := _ANSWER.findall(answer)):
        answer = tagged[-1]
    if len(values) == 2:
        return bare_question(values[0]), answer.strip(), []
    found = _BOX.findall(values[1])
    if not found:
        raise BadRecord(f"box: the second turn {shown(values[1])} holds no box [x1, y1, x2, y2]")
    return bare_question(values[0]), answer.strip(), [spelled_corners(text) for text in found]


def _is_no_text(value: Any) -> bool:
    return type(value) is not str


def _wrong_turn(turns: list[Any]) -> str:
    """The first turn that is not as it must be, in words."""
    for place, turn in enumerate(turns):
        speaker = _SPEAKERS[place % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            return f"{place + 1} is no object with 'from': '{speaker}' and a text as 'value'"
    raise AssertionError("called for turns of which one is wrong")


def bare_question(text: str) -> str:
    """The question itself: without image marks and without the requests at its end."""
    text = text.replace("<image>", " ").strip()
    while text[-_LONGEST:].lower().removesuffix(".").endswith(_REQUESTS):
        bare = text.removesuffix(".")
        text = next(bare[: -len(each)] for each in _REQUESTS if bare.lower().endswith(each)).rstrip()
    return text


def _boxes(
    written: list[Corners], pixels: list[Corners], on: list[int], images: int
) -> tuple[tuple[Corners, ...], tuple[int, ...], str]:
    """The boxes to use, the image that each is on, and their unit."""
    if not written:
        return tuple(pixels), tuple(on), PIXELS
    if pixels:
        for x1, y1, x2, y2 in written:
            if x1 == x2 or y1 == y2:  # three decimals can round a thin box flat; its pixels are exact
                return tuple(pixels), tuple(on), PIXELS
    if pixels and len(pixels) != len(written):
        raise BadRecord(f"box: {len(written)} normalised boxes stand against {len(pixels)} in pixels")
    if not pixels and images > 1:
        raise BadRecord(f"box: they do not say on which of the {images} images they are")
    return tuple(written), tuple(on) or (0,) * len(written), SHARES
