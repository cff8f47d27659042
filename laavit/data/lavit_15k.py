"""LaViT-SFT-15K as its authors store it: ``{"results": [...]}``, one record a sample with paths of its features.

The features themselves (``v_top``: a torch file [N, 5120]; the attention: a JSON of steps) are not read here: their
paths are in ``Sample.meta`` for the command that imports them into a trace store.
"""

from __future__ import annotations

from typing import Any

from laavit.data.parsing import (
    OVERSHOOT,
    PIXELS,
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
from laavit.data.visual_cot import bare_question
from laavit.registry import DATASETS

#: what the meta calls a feature's path -> the authors' keys, the first that is given
_FEATURES = {
    "v_top_path": ("v_top_path_abs", "v_top_path", "v_top_layer_path"),
    "attention_path": ("attention_path_abs", "attention_path", "trajectory_path"),
}
_FORMAT_KEYS = {"question_id", "id", "question", "ground_truth", "ground_truth_enriched", "image_relative_path"}
_FORMAT_KEYS |= {"dataset", "source_dataset", "split", "bboxes", *(key for keys in _FEATURES.values() for key in keys)}


@DATASETS.register_module()
class Lavit15k(RecordReader):
    """Samples of LaViT-SFT-15K; ``meta["v_top_path"]`` and ``meta["attention_path"]`` are its features' paths.

    The answer is ``ground_truth_enriched``, or ``ground_truth`` where that is empty. An id is ``question_id``, or the
    record's place in the file where there is none. ``bboxes``, where given, are normalised, or pixels where one of them
    exceeds the unit square. Other keys are kept in the meta as far as they are single values.

    Args:
        annotations: the authors' training JSON, ``{"results": [...]}``, or its list, or JSON lines; plain or gzipped.
        root: the folder that ``image_relative_path`` is relative to; nothing outside it is ever opened.
        split: only records of this split; ``None`` takes all.
        limit: at most this many samples, from the start.
        max_characters: a longer question or answer puts its record into quarantine.
    """

    wrapper = "results"
    key_name = "question_id"

    def parse(self, item: Any, place: int) -> list[Record | BadRecord]:
        """One record; see ``RecordReader``."""
        if not isinstance(item, dict):
            raise BadRecord(f"format: it is {kind_of(item)}; allowed: an object with 'question' and its answer")
        given = item.get("question_id") is not None or item.get("id") is not None
        key = read_key(item, "question_id", "id") if given else str(place)
        with keyed(key):
            return [_record(key, item)]


def _record(key: str, item: dict[str, Any]) -> Record:
    path = item.get("image_relative_path")
    if not isinstance(path, str):
        raise BadRecord(f"image: 'image_relative_path' is {shown(path)}; allowed: a path below the root")
    check_path(path)
    meta = {
        name: value
        for name, value in item.items()
        if name not in _FORMAT_KEYS and isinstance(value, (str, int, float, bool))
    }
    for name, keys in _FEATURES.items():
        value = next((item[each] for each in keys if item.get(each) is not None), None)
        if value is not None and not isinstance(value, str):
            raise BadRecord(f"features: '{keys[0]}' is {kind_of(value)}; allowed: a path")
        if value is not None:
            meta[name] = value
    listed = item.get("bboxes") or []
    if not isinstance(listed, list):
        raise BadRecord(f"box: 'bboxes' is {kind_of(listed)}; allowed: a list of [x1, y1, x2, y2]")
    corners = tuple(map(read_corners, listed))
    unit = PIXELS if any(max(box) > 1 + OVERSHOOT for box in corners) else SHARES
    return Record(
        key=key,
        images=(path,),
        question=bare_question(read_text(item, "question")),
        answer=(read_text(item, "ground_truth_enriched").strip() or read_text(item, "ground_truth").strip()),
        corners=corners,
        places=(0,) * len(corners),
        unit=unit,
        source=read_text(item, "dataset") or read_text(item, "source_dataset"),
        split=read_text(item, "split", "train"),
        meta=meta,
    )
