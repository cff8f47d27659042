"""Does looking at the right place go with being right? (LaViT, Sec. 3.1, Fig. 2)

``S_focus`` is the attention mass inside the ground-truth boxes over all mass on the image, while the model gives its
own greedy answer. Kinds of questions differ in both, how large their boxes are and how hard they are: over all samples
the two can go together, or against one another, without doing so within any kind (Simpson's paradox). So every figure
is there for all samples and within the kinds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laavit.evaluation.analyses.intervals import (
    ITERATIONS,
    Floats,
    contrast,
    intervals,
    permutation_p,
    ratio,
)
from laavit.evaluation.gaze import NO_LOADING, Looker, check_lookers, look
from laavit.evaluation.statistics import wilson
from laavit.registry import UserError
from laavit.structures import Sample, Trace
from laavit.traces.grids import in_box_mass, sample_mask
from laavit.traces.matching import match_score

logger = logging.getLogger(__name__)

#: Sec. 3.1: mean S_focus of right and wrong answers, 1,000 samples of Visual-CoT
PAPER = {"focus_correct": 0.1589, "focus_wrong": 0.1184, "n": 1000}
#: right answers, and wrong ones, that a difference needs: intervals of fewer say nothing
LEAST = 5
#: points of the curve
POINTS = 21


def focus(
    lookers: Sequence[Looker],
    samples: Sequence[Sample],
    batch_size: int = 32,
    max_new_tokens: int = 64,
    minimum: float = 1.0,
    loading: Mapping[str, Any] = NO_LOADING,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """S_focus against correctness for every looker.

    Args:
        samples: those without boxes are left out and counted.
        minimum: the score (laavit/traces/matching.py) from which on an answer is right.

    Returns: the figures, and a record for each looker and sample.

    Raises:
        UserError: no sample has boxes, or a looker cannot be read.
    """
    check_lookers(lookers)
    boxed = [sample for sample in samples if sample.boxes]
    if not boxed:
        raise UserError(f"none of the {len(samples)} samples has a box; S_focus is the attention inside of boxes")
    result: dict[str, Any] = {"n": len(boxed), "without_boxes": len(samples) - len(boxed), "minimum": minimum}
    records: list[dict[str, Any]] = []
    models = {}
    for looker in lookers:
        found = look(looker, boxed, batch_size, "own", max_new_tokens, loading)
        own = [record(looker.name, sample, trace, minimum) for sample, trace in zip(boxed, found, strict=True)]
        models[looker.name] = figures(
            [each["focus"] for each in own], [each["correct"] for each in own], [each["kind"] for each in own]
        )
        records += own
    return result | {"models": models, "paper": PAPER}, records


def record(model: str, sample: Sample, trace: Trace, minimum: float = 1.0) -> dict[str, Any]:
    """One sample as one model saw and answered it."""
    return {
        "model": model,
        "id": sample.id,
        "kind": sample.source,
        "prediction": trace.answer,
        "target": sample.answer,
        "correct": match_score(trace.answer, sample.answer, sample.question) >= minimum,
        "focus": in_boxes(sample, trace),
    }


def in_boxes(sample: Sample, trace: Trace) -> float:
    """S_focus of Sec. 3.1, in float64: the share of the map's mass inside the sample's boxes."""
    gaze = trace.gaze.double()
    return float(in_box_mass(gaze, sample_mask(sample.boxes, trace.tiles, gaze.dtype)))


def figures(
    focus: Sequence[float], correct: Sequence[bool], kinds: Sequence[str], iterations: int = ITERATIONS
) -> dict[str, Any]:
    """Fig. 2's figures from one value, one verdict and one kind a sample.

    Returns: ``accuracy`` (Wilson), ``focus`` of all, of right and of wrong answers, their ``difference`` with ``p``
        (permutation), the same ``within`` kinds, ``by_kind``, and the ``curve``. A difference of fewer than 5 right or
        wrong answers is None.
    """
    score, right = np.asarray(focus, dtype=np.float64), np.asarray(correct, dtype=bool)
    names, kind = np.unique(np.asarray(kinds), return_inverse=True)
    result = _group(score, right, iterations)
    if result["difference"] is None:
        logger.warning(
            "%d answers are right and %d wrong: too few to compare their S_focus", right.sum(), (~right).sum()
        )
    (difference,) = intervals([contrast(score, right, kind)], len(score), iterations)
    enough = result["difference"] is not None
    result["within"] = {
        "difference": difference if enough else None,
        "p": permutation_p(score, right, kind) if enough else None,
        "kinds": len(names),
    }
    result["by_kind"] = {
        str(name): _group(score[kind == i], right[kind == i], iterations) for i, name in enumerate(names)
    }
    result["curve"] = curve(score, right, iterations)
    return result


def _group(score: Floats, right: NDArray[np.bool_], iterations: int) -> dict[str, Any]:
    """Accuracy and S_focus of some samples; ``difference`` is that of right minus that of wrong answers."""
    counted, total = int(right.sum()), len(right)
    marks = np.stack([np.ones(total), right, ~right], axis=1)
    values = intervals([ratio(score[:, None] * marks, marks), contrast(score, right)], total, iterations)
    enough = min(counted, total - counted) >= LEAST
    return {
        "n": total,
        "right": counted,
        "accuracy": [counted / total, *wilson(counted, total)],
        "focus": values[0],
        "focus_correct": values[1],
        "focus_wrong": values[2],
        "difference": values[3] if enough else None,
        "p": permutation_p(score, right) if enough else None,
    }


def curve(
    score: Floats, right: NDArray[np.bool_], iterations: int = ITERATIONS, points: int = POINTS
) -> list[dict[str, Any]]:
    """Accuracy of the samples with S_focus of at least a threshold, with a pointwise bootstrap band over samples.

    Thresholds go in equal steps from 0 to the last that leaves a twentieth of the samples, and 20 of them at least.
    """
    least = min(len(score), max(20, len(score) // 20))
    highest = float(np.sort(score)[len(score) - least])
    thresholds = np.linspace(0, highest, points) if highest > 0 else np.zeros(1)
    kept = (score[:, None] >= thresholds).astype(np.float64)  # [n, points]
    found = intervals([ratio(kept * right[:, None], kept)], len(score), iterations)
    return [{"threshold": float(t), "n": int(kept[:, i].sum()), "accuracy": found[i]} for i, t in enumerate(thresholds)]
