"""S_focus against correctness: hand-worked figures, and the records of a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from laavit.evaluation.analyses.focus import curve, figures, focus, record
from laavit.evaluation.gaze import Looker, look
from laavit.registry import UserError
from laavit.structures import Box, Sample, Tile, Trace

#: kind "a": right ones look better by 0.1; kind "b" too, but there boxes are small and questions easy
SCORES = {"a": ([0.8] * 5, [0.7] * 15), "b": ([0.3] * 15, [0.2] * 5)}


def listed() -> tuple[list[float], list[bool], list[str]]:
    score, right, kinds = [], [], []
    for kind, (of_right, of_wrong) in SCORES.items():
        score += of_right + of_wrong
        right += [True] * len(of_right) + [False] * len(of_wrong)
        kinds += [kind] * 20
    return score, right, kinds


def test_figures_by_hand() -> None:
    """Over all, right answers look worse by 0.15; within every kind they look better by 0.1 (Simpson)."""
    found = figures(*listed(), iterations=500)
    assert found["accuracy"][0] == 0.5 and found["n"] == 40 and found["right"] == 20
    assert found["focus"][0] == pytest.approx((5 * 0.8 + 15 * 0.7 + 15 * 0.3 + 5 * 0.2) / 40)
    assert found["focus_correct"][0] == pytest.approx((5 * 0.8 + 15 * 0.3) / 20)
    assert found["focus_wrong"][0] == pytest.approx((15 * 0.7 + 5 * 0.2) / 20)
    mean, low, high = found["difference"]
    assert mean == pytest.approx(-0.15) and low < -0.15 < high < 0.05 and 0.01 < found["p"] < 0.15
    assert found["within"]["difference"] == pytest.approx([0.1] * 3) and found["within"]["kinds"] == 2
    assert found["within"]["p"] == pytest.approx(1e-4)
    for kind in "ab":
        assert found["by_kind"][kind]["difference"] == pytest.approx([0.1] * 3) and found["by_kind"][kind]["n"] == 20
    assert found["by_kind"]["a"]["accuracy"][0] == 0.25


def test_a_few_wrong_answers_give_no_difference(caplog: pytest.LogCaptureFixture) -> None:
    found = figures([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [True] * 5 + [False], ["a"] * 6, iterations=50)
    assert found["difference"] is None and found["p"] is None and found["within"]["difference"] is None
    assert found["focus_wrong"][0] == 0.6 and "too few" in caplog.text
    all_right = figures([0.1, 0.2], [True, True], ["a", "a"], iterations=50)
    assert all_right["focus_wrong"] is None and all_right["accuracy"][0] == 1


def test_the_curve_by_hand() -> None:
    """40 samples at 0.0, 0.5 and 1.0: accuracy of those that are at least as high; 20 are left at the last."""
    score = np.repeat([0.0, 0.5, 1.0], [10, 10, 20])
    right = np.concatenate([np.zeros(10), np.repeat([1, 0], [5, 5]), np.ones(20)]).astype(bool)
    found = curve(score, right, iterations=400, points=5)
    assert [point["threshold"] for point in found] == [0, 0.25, 0.5, 0.75, 1.0]
    assert [point["n"] for point in found] == [40, 30, 30, 20, 20]
    assert [point["accuracy"][0] for point in found] == pytest.approx([25 / 40, 25 / 30, 25 / 30, 1, 1])
    mean, low, high = found[0]["accuracy"]
    assert low == pytest.approx(mean - 0.15, abs=0.03) and high == pytest.approx(mean + 0.15, abs=0.03)
    assert found[-1]["accuracy"] == [1, 1, 1]
    assert [point["threshold"] for point in curve(np.zeros(3), np.ones(3, dtype=bool), 10)] == [0]


def test_a_record_by_hand() -> None:
    """A box over the right half and a quarter of the left cell: (1 * 0.5 + 3 * 1) / 4."""
    sample = Sample("s", (Path("x"),), "What?", "3", (Box(0.25, 0, 1, 1),), source="k")
    trace = Trace("s", "Three.", (Tile(1, 2),), torch.tensor([1.0, 3.0]), torch.ones(2), 0.5)
    found = record("m", sample, trace)
    assert found["focus"] == 0.875 and found["correct"] is True and found["kind"] == "k"
    assert record("m", sample, replace(trace, answer="two"))["correct"] is False


def test_a_model_is_read_while_it_gives_its_own_answers(boxed: list[Sample], tiny_folder: Path) -> None:
    looker = Looker("m", str(tiny_folder))
    unboxed = replace(boxed[0], id="none", boxes=())
    result, records = focus([looker], [unboxed, *boxed], batch_size=3, max_new_tokens=3)
    traces = look(looker, boxed, batch_size=1, answer="own", max_new_tokens=3)
    assert result["n"] == len(boxed) == len(records) and result["without_boxes"] == 1
    for found, trace, sample in zip(records, traces, boxed, strict=True):
        assert found["prediction"] == trace.answer and trace.answer != sample.answer
        (tile,) = trace.tiles
        grid = trace.gaze.double().reshape(tile.height, tile.width)
        assert found["focus"] == pytest.approx(float(grid[:, tile.width // 2 :].sum() / grid.sum()), abs=1e-5)
    assert result["models"]["m"]["focus"][0] == pytest.approx(np.mean([each["focus"] for each in records]))


def test_without_boxes_there_is_no_focus(boxed: list[Sample]) -> None:
    with pytest.raises(UserError, match="none of the 1 samples has a box"):
        focus([Looker("m", "nowhere")], [replace(boxed[0], boxes=())])
