"""LLaVA-style conversations (arXiv 2304.08485): many open instruction sets have this form.

A record is ``id``, ``image`` (a path or a list of them; ``images`` is read, too) and ``conversations``: turns of a
human and a model in turn, ``{"from": "human" | "gpt", "value": ...}`` or ``{"role": "user" | "assistant", "content":
...}``, after a system turn or without one.
"""

from __future__ import annotations

from typing import Any

from laavit.data.parsing import (
    SHARES,
    BadRecord,
    Record,
    check_path,
    keyed,
    kind_of,
    read_corners,
    read_key,
    read_text,
    shown,
)
from laavit.data.records import RecordReader
from laavit.registry import DATASETS

_ASKS, _ANSWERS, _SYSTEM = ("human", "user"), ("gpt", "assistant"), ("system",)
_FORMAT_KEYS = frozenset({"id", "image", "images", "conversations", "messages", "bboxes", "dataset", "source", "split"})


@DATASETS.register_module()
class Llava(RecordReader):
    """One sample a pair of question and answer; its id is ``ID-1``, ``ID-2``, ... by the pair's place in the record.

    A later pair is asked without those before it. Records without an image are put into quarantine: there is nothing to
    look at. Published sets use an id for several conversations about one image: the second is numbered (``ID-1~2``).
    The source set is ``dataset`` or ``source``, or else the first folder of the image's path. ``bboxes`` (normalised),
    where given, belong to the first image of a record with one image.

    Args:
        annotations: the file: a JSON list or JSON lines, plain or gzipped.
        root: the folder that the records' image paths are relative to; nothing outside it is ever opened.
        split: only records of this split; ``None`` takes all.
        limit: at most this many samples, from the start.
        max_characters: a longer question or answer puts its pair into quarantine.
    """

    numbered = True

    def parse(self, item: Any, place: int) -> list[Record | BadRecord]:
        """One record a pair of turns; see ``RecordReader``."""
        if not isinstance(item, dict):
            raise BadRecord(f"format: it is {kind_of(item)}; allowed: an object with 'image' and 'conversations'")
        key = read_key(item, "id")
        with keyed(key):
            images = _images(item)
            listed = item.get("bboxes") or []
            if not isinstance(listed, list) or (listed and len(images) > 1):
                raise BadRecord(f"box: 'bboxes' is {shown(listed)}; allowed: a list of boxes, of one image")
            corners = tuple(map(read_corners, listed))
            turns = item.get("conversations", item.get("messages"))
            if not isinstance(turns, list):
                raise BadRecord(f"conversations: they are {kind_of(turns)}; allowed: a list of turns")
            source = read_text(item, "dataset") or read_text(item, "source")
            split = read_text(item, "split", "train")
        source = source or (images[0].split("/")[0] if "/" in images[0] else "")
        meta = {name: value for name, value in item.items() if name not in _FORMAT_KEYS}
        turns = turns[1:] if turns and _speaker(turns[0]) in _SYSTEM else turns
        found: list[Record | BadRecord] = []
        for number in range(1, (len(turns) + 1) // 2 + 1):
            own = f"{key}-{number}"
            try:
                question, answer = _pair(turns[2 * number - 2 : 2 * number])
            except BadRecord as bad:
                found.append(BadRecord(bad.reason, own))
                continue
            places = (0,) * len(corners)
            record = Record(own, images, question, answer, corners, places, SHARES, source, split, meta)
            found.append(record)
        if not found:
            raise BadRecord("conversations: there is no turn", key)
        return found


def _images(item: dict[str, Any]) -> tuple[str, ...]:
    value = item.get("image") or item.get("images")
    paths = [value] if isinstance(value, str) else value
    if not paths:
        raise BadRecord("image: the record has none")
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise BadRecord(f"image: it is {shown(value)}; allowed: a path, or a list of paths")
    for path in paths:
        check_path(path)
    return tuple(paths)


def _speaker(turn: Any) -> Any:
    return turn.get("from", turn.get("role")) if isinstance(turn, dict) else None


def _pair(turns: list[Any]) -> tuple[str, str]:
    """Question and answer of two turns."""
    if len(turns) < 2:
        raise BadRecord("conversations: the last question has no answer")
    texts = []
    for turn, speakers in zip(turns, (_ASKS, _ANSWERS), strict=True):
        if _speaker(turn) not in speakers:
            raise BadRecord(f"conversations: {shown(_speaker(turn))} speaks where one of {', '.join(speakers)} should")
        text = turn.get("value", turn.get("content"))
        if not isinstance(text, str):
            raise BadRecord(f"conversations: what {speakers[0]} says is {kind_of(text)}; allowed: a text")
        texts.append(text)
    return texts[0].replace("<image>", " ").strip(), texts[1].strip()
