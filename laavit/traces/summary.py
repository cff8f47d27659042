"""What is in a store, in figures: answers, maps (Table 2's statistics), mass in the boxes; one pass, bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from laavit.structures import Box, Trace
from laavit.traces.gaze import cv, entropy, salient_regions
from laavit.traces.grids import in_box_mass, sample_mask
from laavit.traces.store import TraceStore


@dataclass(frozen=True)
class Figures:
    """Mean, standard deviation (over samples) and extremes of a quantity."""

    count: int
    mean: float
    deviation: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figures:
        array = np.asarray(values, dtype=np.float64)
        if not len(array):
            return cls(0, math.nan, math.nan, math.nan, math.nan)
        deviation = float(array.std(ddof=1)) if len(array) > 1 else 0.0
        return cls(len(array), float(array.mean()), deviation, float(array.min()), float(array.max()))


#: quantity -> what it is called where it is shown
MEASURES = {
    "words": "words of the answer",
    "tokens": "image tokens",
    "mass": "attention on the image",
    "entropy": "entropy of the map, nats",
    "salient": "patches above 1.5 x mean",
    "cv": "sigma / mean of the map",
    "in_box": "share of the map in the boxes",
    "steps": "steps of the trajectory",
    "rows": "rows of semantics",
    "answer_tokens": "answer tokens with logits",
    "outside": "probability outside of the kept logits",
}


@dataclass(frozen=True)
class Summary:
    """A store in figures.

    Args:
        figures: quantity (see ``MEASURES``) -> its figures; only what there is.
        flat: traces whose map is zero everywhere. unanswered: traces with an empty answer. blind: with a blind answer.
    """

    figures: Mapping[str, Figures]
    flat: int
    unanswered: int
    blind: int


def measure(trace: Trace, boxes: Sequence[Box] = ()) -> dict[str, float]:
    """The figures of one trace; statistics of a map only where it has mass."""
    found = {"words": float(len(trace.answer.split())), "tokens": float(len(trace.gaze)), "mass": trace.mass}
    if trace.steps:
        found["steps"] = float(len(trace.steps))
    if trace.semantic_tokens is not None:
        found["rows"] = float(len(trace.semantic_tokens))
    if trace.logits is not None:
        found["answer_tokens"] = float(len(trace.logits.tokens))
        found["outside"] = float(1 - trace.logits.logprobs.double().exp().sum(-1).mean())
    gaze = trace.gaze.double()
    if bool(gaze.sum() > 0):
        found |= {"entropy": float(entropy(gaze)), "salient": float(salient_regions(gaze)), "cv": float(cv(gaze))}
        if boxes:
            found["in_box"] = float(in_box_mass(gaze, sample_mask(boxes, trace.tiles, gaze.dtype)))
    return found


def summarise(
    store: TraceStore, boxes: Mapping[str, Sequence[Box]] | None = None, ids: Iterable[str] | None = None
) -> Summary:
    """The figures of a store's traces, or of some of them.

    Args:
        boxes: sample id -> ground-truth boxes, where they are known.
    """
    values: dict[str, list[float]] = {name: [] for name in MEASURES}
    flat = unanswered = blind = 0
    wanted = store.ids if ids is None else tuple(ids)
    for key in track(wanted, "reading traces", console=Console(stderr=True), transient=True):
        trace = store.get(key)
        found = measure(trace, (boxes or {}).get(key, ()))
        for name, value in found.items():
            values[name].append(value)
        flat += "entropy" not in found
        unanswered += not trace.answer.strip()
        blind += trace.blind_answer is not None
    figures = {name: Figures.of(column) for name, column in values.items() if column}
    return Summary(figures, flat, unanswered, blind)


def settings_lines(header: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A store's header as (key, value) lines, nested keys dotted, long values cut."""

    def flat(value: Any, prefix: str) -> list[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            return [line for key in sorted(value) for line in flat(value[key], f"{prefix}.{key}" if prefix else key)]
        text = value if isinstance(value, str) else repr(value)
        text = " ".join(text.split())
        return [(prefix, text if len(text) <= 90 else f"{text[:87]}...")]

    return flat(header, "")
