"""Where each model looks, sample by sample (LaViT, Fig. 5): the maps, shares and answers of a contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laavit.evaluation.analyses.focus import in_boxes
from laavit.evaluation.gaze import NO_LOADING, Looker, check_lookers, look, map_of, spread
from laavit.registry import UserError
from laavit.structures import Sample
from laavit.traces.matching import match_score


def overlay(
    lookers: Sequence[Looker],
    samples: Sequence[Sample],
    show: int = 6,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    minimum: float = 1.0,
    loading: Mapping[str, Any] = NO_LOADING,
) -> dict[str, Any]:
    """Maps of ``show`` samples, taken in turn from every source, on different images; answers are the models' own.

    Returns: ``samples``, each with image (the one its first box is on), question, gold answer, boxes on that image, and
        for every model ``grid``, ``values``, ``in_box`` (S_focus over all images; None without boxes), answer, verdict.

    Raises:
        UserError: there is no sample, or a looker cannot be read.
    """
    check_lookers(lookers)
    if not samples:
        raise UserError("there is no sample to look at")
    shown = [samples[place] for place in spread(samples, show)]
    found = {each.name: look(each, shown, batch_size, "own", max_new_tokens, loading) for each in lookers}
    sheet = []
    for place, sample in enumerate(shown):
        image = sample.boxes[0].image if sample.boxes else 0
        models = {}
        for name, traces in found.items():
            trace = traces[place]
            models[name] = {
                **map_of(trace, image),
                "in_box": in_boxes(sample, trace) if sample.boxes else None,
                "answer": trace.answer,
                "correct": match_score(trace.answer, sample.answer, sample.question) >= minimum,
            }
        sheet.append(
            {
                "id": sample.id,
                "kind": sample.source,
                "image": str(sample.images[image]),
                "question": sample.question,
                "answer": sample.answer,
                "boxes": [[box.x1, box.y1, box.x2, box.y2] for box in sample.boxes if box.image == image],
                "models": models,
            }
        )
    return {"n": len(sheet), "samples": sheet}
