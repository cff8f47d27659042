"""What every reader's parser is made of: the record's normal form, and the checks of its parts.

A check raises ``BadRecord`` with a reason of the form ``kind: sentence``; the reader puts the record's place before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from laavit.structures import Box

#: How far a coordinate may reach past the image, as a share of its side: 871 published boxes overshoot by rounding.
OVERSHOOT = 0.01

SHARES = "share"  # boxes as shares of the image's sides
PIXELS = "pixel"

_DRIVE = re.compile(r"[A-Za-z]:")
_SEPARATOR = re.compile(r"[/\\]")

Corners = tuple[float, float, float, float]


class BadRecord(ValueError):
    """One record (or one turn of it) that is not as the format says.

    Args:
        reason: 'kind: what was found; what is allowed'. key: its id as far as it could be read.
    """

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(reason)
        self.reason, self.key = reason, key


@contextmanager
def keyed(key: str) -> Iterator[None]:
    """What is refused while it is open is said of the record with this id."""
    try:
        yield
    except BadRecord as bad:
        bad.key = key
        raise


class Record(NamedTuple):
    """A record in normal form: checked, but for what only its image files can tell.

    Args:
        key: its id as the file has it, not yet unique. images: paths relative to the root.
        corners: x1, y1, x2, y2 of every box, as the file has them. places: the image each box is on.
        unit: of the corners, SHARES or PIXELS. meta: plain data that is no part of a sample.
    """

    key: str
    images: tuple[str, ...]
    question: str
    answer: str
    corners: tuple[Corners, ...] = ()
    places: tuple[int, ...] = ()
    unit: str = SHARES
    source: str = ""
    split: str = "train"
    meta: Mapping[str, Any] = {}


def kind_of(value: Any) -> str:
    """What a value is, for a sentence."""
    return "nothing" if value is None else f"a value of type {type(value).__name__}"


def shown(value: Any, most: int = 80) -> str:
    """A value for a sentence: one line, not endless."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else text[:most] + "…"


def read_key(item: Mapping[str, Any], *names: str) -> str:
    """The id under the first of ``names`` that is given."""
    value = None
    for name in names:
        value = item.get(name)
        if value is not None:
            break
    if type(value) is int and abs(value) < 10**100:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f"id: '{names[0]}' is {shown(value)}; allowed: a whole number or a text")
    return value.strip()


def read_text(item: Mapping[str, Any], name: str, default: str = "") -> str:
    """A text that may be left out."""
    value = item.get(name, default)
    if not isinstance(value, str):
        raise BadRecord(f"{name}: it is {kind_of(value)}; allowed: a text")
    return value


def check_path(path: str) -> None:
    """An image path below the root: relative, in no system's spelling absolute, without '..'.

    Plain text, since pathlib would double the time to read a file.
    """
    if not path.strip() or "\0" in path:
        raise BadRecord("image: its path is empty or holds a null character")
    if path[0] in "/\\" or (path[1:2] == ":" and _DRIVE.match(path)):
        raise BadRecord(f"image: the path {shown(path)} is absolute or holds '..'; allowed: a path below the root")
    if ".." in path and ".." in _SEPARATOR.split(path):
        raise BadRecord(f"image: the path {shown(path)} is absolute or holds '..'; allowed: a path below the root")


def read_corners(values: Any) -> Corners:
    """Four finite numbers, not inverted, from a list of numbers."""
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise BadRecord(f"box: {shown(values)} is not four numbers [x1, y1, x2, y2]")
    return _ordered(values, values)


def spelled_corners(text: str) -> Corners:
    """The same from a text, ``x1, y1, x2, y2``."""
    return _ordered(text.split(","), text)


def _ordered(values: list[Any], given: Any) -> Corners:
    try:
        x1, y1, x2, y2 = map(float, values)
    except (ValueError, OverflowError):
        raise BadRecord(f"box: {shown(given)} is not four numbers [x1, y1, x2, y2]") from None
    if not math.isfinite(x1 + y1 + x2 + y2):
        raise BadRecord(f"box: {shown(given)} holds a number that is not finite")
    if x1 > x2 or y1 > y2:
        raise BadRecord(f"box: {shown(given)} is inverted; allowed: x1 < x2 and y1 < y2")
    return x1, y1, x2, y2


def to_box(corners: Corners, image: int = 0, size: tuple[int, int] | None = None) -> Box:
    """Corners -> Box; an overshoot of up to 1 % is clamped.

    Args:
        size: (width, height) of the upright image that pixel corners are divided by; None: they are shares already.
    """
    x1, y1, x2, y2 = corners
    if size is not None:
        x1, y1, x2, y2 = x1 / size[0], y1 / size[1], x2 / size[0], y2 / size[1]
    if x1 < -OVERSHOOT or y1 < -OVERSHOOT or x2 > 1 + OVERSHOOT or y2 > 1 + OVERSHOOT:
        of = "its image" if size is None else f"its image of {size[0]} x {size[1]} pixels"
        raise BadRecord(f"box: {list(corners)} reaches more than 1 % past {of}")
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, 1.0), min(y2, 1.0)
    if x1 >= x2 or y1 >= y2:
        raise BadRecord(f"box: {list(corners)} has no area inside its image")
    return Box(x1, y1, x2, y2, image)


def checked_boxes(record: Record, most: int) -> Record:
    """The same record, once its texts and boxes are as they must be.

    Args:
        most: the longest question or answer, in characters.
    """
    if not record.question:
        raise BadRecord("question: it is empty", record.key)
    if not record.answer:
        raise BadRecord("answer: it is empty", record.key)
    longest = max(len(record.question), len(record.answer))
    if longest > most:
        what = "question" if len(record.question) == longest else "answer"
        raise BadRecord(f"{what}: it has {longest} characters; allowed: {most} (max_characters)", record.key)
    if record.unit == SHARES:
        for corners in record.corners:
            x1, y1, x2, y2 = corners
            if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
                to_box(corners)
    text = "".join((record.key, record.question, record.answer, record.source, record.split, *record.images))
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        raise BadRecord("encoding: it holds text that is no valid UTF-8", record.key) from None
    return record
