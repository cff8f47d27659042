"""A contact sheet's data: samples in turn from their sources, maps over one image, shares and answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from laavit.evaluation.analyses.overlay import overlay
from laavit.evaluation.gaze import Looker, look
from laavit.registry import UserError
from laavit.structures import Box, Sample


def test_the_sheet_holds_what_the_models_saw_and_said(boxed: list[Sample], tiny_folder: Path) -> None:
    two = replace(boxed[3], images=(boxed[2].images[0], boxed[3].images[0]), boxes=(Box(0, 0, 1, 0.5, image=1),))
    looker = Looker("m", str(tiny_folder))
    found = overlay([looker], [*boxed[:3], two], show=3, max_new_tokens=3)
    assert [sample["kind"] for sample in found["samples"]] == ["a", "b", "b"] or found["n"] == 3
    everything = overlay([looker], [two, boxed[0]], show=2, max_new_tokens=3)
    entry = next(sample for sample in everything["samples"] if sample["id"] == two.id)
    (trace,) = look(looker, [two], answer="own", max_new_tokens=3)
    first, second = trace.tiles
    assert entry["image"] == str(two.images[1]) and entry["boxes"] == [[0, 0, 1, 0.5]]
    own = entry["models"]["m"]
    assert own["grid"] == [second.height, second.width] and own["answer"] == trace.answer
    drawn = trace.gaze[first.cells :].double().numpy()
    assert own["values"] == pytest.approx(drawn, abs=1e-6)
    # S_focus is over all of the sample's images: the box is the upper half of the second
    upper = drawn.reshape(second.height, second.width)[: second.height // 2].sum()
    assert own["in_box"] == pytest.approx(upper / float(trace.gaze.sum()), abs=1e-5)
    assert own["correct"] is (trace.answer.strip() == two.answer)


def test_samples_without_boxes_have_no_share(boxed: list[Sample], tiny_folder: Path) -> None:
    found = overlay([Looker("m", str(tiny_folder))], [replace(boxed[0], boxes=())], max_new_tokens=2)
    (entry,) = found["samples"]
    assert entry["boxes"] == [] and entry["models"]["m"]["in_box"] is None
    assert np.sum(entry["models"]["m"]["values"]) > 0
    with pytest.raises(UserError, match="no sample"):
        overlay([Looker("m", "nowhere")], [])
