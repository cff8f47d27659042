"""Table 2 in float64 against plain loops, and differences of models over the same samples."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from laavit.evaluation.analyses.attention import attention, table
from laavit.evaluation.gaze import MEASURES, Looker, look, measures, statistics
from laavit.registry import UserError
from laavit.structures import Box, Sample, Tile, Trace


def plainly(gaze: list[float], inside: list[float]) -> dict[str, float]:
    """The definitions, one term after another."""
    total, n = sum(gaze), len(gaze)
    mean = total / n
    h = -sum(g / total * math.log(g / total) for g in gaze if g > 0)
    regions = sum(g > 1.5 * mean for g in gaze)
    spread = math.sqrt(sum((g - mean) ** 2 for g in gaze) / n)
    share = sum(g * m for g, m in zip(gaze, inside)) / total
    return {
        "entropy": h, "entropy_share": h / math.log(n), "salient": regions, "salient_share": regions / n,
        "cv": spread / mean, "in_box": share,
    }  # fmt: skip


def test_measures_equal_plain_loops_in_float64() -> None:
    random = np.random.default_rng(0)
    samples, traces, expected = [], [], []
    for i, (height, width) in enumerate(((2, 3), (5, 4), (7, 7))):
        gaze = random.exponential(size=height * width) * (random.random(height * width) < 0.8)
        # the box covers the columns from the first on, and a third of it
        inside = [1.0 if column else 1 / 3 for _ in range(height) for column in range(width)]
        box = Box(2 / 3 / width, 0, 1, 1)
        samples.append(Sample(str(i), (Path("x"),), "?", "", (box,)))
        traces.append(Trace(str(i), "", (Tile(height, width),), torch.tensor(gaze), torch.ones(1), 1.0))
        expected.append(plainly(gaze.tolist(), inside))
    found = measures(traces, samples)
    for name in MEASURES:
        assert found[name] == pytest.approx([each[name] for each in expected], rel=1e-12), name
    uniform = Trace("u", "", (Tile(2, 2),), torch.ones(4), torch.ones(1), 1.0)
    assert measures([uniform], [Sample("u", (Path("x"),), "?", "")]) == {
        "entropy": [pytest.approx(math.log(4))], "entropy_share": [pytest.approx(1)], "salient": [0.0],
        "salient_share": [0.0], "cv": [0.0], "in_box": [],
    }  # fmt: skip


def test_the_table_by_hand() -> None:
    """Both models' values go up and down together: their difference is 1 +- 0, though each is spread widely."""
    column = np.arange(20.0).tolist()
    found = table(
        {"a": {"entropy": [x + 1 for x in column], "in_box": []}, "b": {"entropy": column, "in_box": []}},
        {"a": [4, 9], "b": [4, 4]},
    )
    a, b = found["models"]["a"], found["models"]["b"]["entropy"]
    assert b["mean"][0] == 9.5 and b["sd"] == pytest.approx(math.sqrt(35)) and a["tokens"] == [4, 9]
    half = 1.96 * math.sqrt(35 * 19 / 20) / math.sqrt(20)
    assert b["mean"][1:] == pytest.approx([9.5 - half, 9.5 + half], abs=0.2)
    assert b["quantiles"] == pytest.approx([0.95, 4.75, 9.5, 14.25, 18.05]) and "in_box" not in a
    assert found["differences"] == [{"first": "a", "second": "b", "measures": {"entropy": pytest.approx([1, 1, 1])}}]


def test_a_model_beside_itself(boxed: list[Sample], tiny_folder: Path) -> None:
    lookers = [Looker("a", str(tiny_folder)), Looker("b", str(tiny_folder), layers=(-1,))]
    found = attention(lookers, boxed, batch_size=3)
    expected = statistics(look(lookers[0], boxed), boxed)  # what laavit gaze writes
    for name in ("entropy", "salient", "cv", "in_box"):
        own = found["models"]["a"][name]
        assert own["mean"][0] == pytest.approx(expected[name][0], rel=1e-5)
        if name != "in_box":
            assert own["sd"] == pytest.approx(expected[name][1], rel=1e-4)
    (pair,) = found["differences"]
    means = [found["models"][name]["cv"]["mean"][0] for name in "ab"]
    assert pair["measures"]["cv"][0] == pytest.approx(means[0] - means[1])
    assert found["n"] == 4 and found["models"]["a"]["tokens"] == [24, 24]


def test_nothing_to_look_at() -> None:
    with pytest.raises(UserError, match="no sample to look at"):
        attention([Looker("a", "nowhere")], [])
