"""The analyses' pictures show the numbers of their JSON, and are readable for whatever shape of image and name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from PIL import Image

from laavit.evaluation.analyses.attention import table
from laavit.evaluation.analyses.focus import PAPER, figures
from laavit.evaluation.analyses.gap import Compared, tables
from laavit.reports.analysis_figures import COLOURS, DRAWN, write_figure

RANDOM = np.random.default_rng(0)


def points(axes: Axes, colour: str) -> set[tuple[float, float, float]]:
    """(mean, low, high) of everything drawn as a dot with its interval in one colour."""
    lines = [line for line in axes.lines if to_rgba(line.get_color()) == to_rgba(colour)]
    dots = [line for line in lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    found = set()
    for dot in dots:
        spans = [line for line in lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 2]
        (span,) = (line for line in spans if list(line.get_ydata()) == [dot.get_ydata()[0]] * 2)
        found.add((dot.get_xdata()[0], *span.get_xdata()))
    return found


def written(name: str, result: dict[str, Any], folder: Path) -> tuple[Any, dict[str, Any]]:
    """The figure drawn from what the JSON file holds."""
    stored = json.loads(json.dumps(result))
    path = write_figure(name, stored, folder / f"{name}.png")
    assert Image.open(path).format == "PNG"
    return DRAWN[name](stored), stored


def test_focus_draws_its_numbers(tmp_path: Path) -> None:
    score = RANDOM.random(60)
    models = {
        name: figures(score.tolist(), (RANDOM.random(60) < 0.6).tolist(), ["a", "b$x$"] * 30, iterations=50)
        for name in ("one_$m$", "two")
    }
    figure, stored = written("focus", {"models": models, "paper": PAPER}, tmp_path)
    groups, contrasts, curves = figure.axes
    for place, each in enumerate(stored["models"].values()):
        assert points(groups, COLOURS[place]) == {tuple(each[key]) for key in ("focus_correct", "focus_wrong")}
        shown = [each, each["within"], *each["by_kind"].values()]
        assert points(contrasts, COLOURS[place]) == {tuple(one["difference"]) for one in shown}
        drawn = curves.lines[place]
        assert list(drawn.get_xdata()) == [point["threshold"] for point in each["curve"]]
        assert list(drawn.get_ydata()) == [point["accuracy"][0] for point in each["curve"]]
        band = curves.collections[place].get_paths()[0].vertices[:, 1]
        assert {point["accuracy"][1] for point in each["curve"]} <= set(band)
        assert {point["accuracy"][2] for point in each["curve"]} <= set(band)
    right = stored["models"]["two"]["right"]
    assert [label.get_text() for label in groups.get_yticklabels()][2:] == [
        f"two: {right} right",
        f"two: {60 - right} wrong",
    ]


def compared(width: int) -> Compared:
    groups = np.array(["functional", "object", "attribute"] * 20)
    states = RANDOM.normal(size=(60, 4))
    cosine = RANDOM.random(60) if width == 4 else None
    return Compared(np.arange(60) // 2, groups, RANDOM.random(60) + 1, cosine, states, RANDOM.normal(size=(60, width)))


@pytest.mark.parametrize("width", [4, 5])
def test_the_gap_draws_its_numbers_and_the_papers(width: int, tmp_path: Path) -> None:
    result = tables({"s": compared(width), "r": compared(width)})
    paper = {"kl": {"functional": 1.11, "attribute": 1.39}, "cosine": [0.52, 0.55]}
    figure, stored = written("gap", result | {"teacher": "t", "paper": paper}, tmp_path)
    measures = ["kl", "cosine", "cka_distance"] if width == 4 else ["kl", "cka_distance"]
    assert len(figure.axes) == len(measures) and ("No cosine" in figure.axes[0].get_xlabel()) == (width == 5)
    for axes, measure in zip(figure.axes, measures, strict=True):
        for place, each in enumerate(stored["students"].values()):
            expected = {tuple(each[measure][group]) for group in ("functional", "object", "attribute")}
            assert points(axes, COLOURS[place]) == expected
    diamonds = {line.get_xdata()[0]: line.get_ydata()[0] for line in figure.axes[0].lines if line.get_marker() == "D"}
    assert diamonds == {1.11: 0, 1.39: 2}


def test_attention_draws_its_numbers(tmp_path: Path) -> None:
    names = ("entropy", "entropy_share", "salient", "salient_share", "cv")
    found = {m: {n: (RANDOM.random(30) + i).tolist() for n in names} | {"in_box": []} for i, m in enumerate("xy")}
    figure, stored = written("attention", table(found, {"x": [4, 4], "y": [9, 9]}), tmp_path)
    panels = [axes for axes in figure.axes if axes.lines]
    assert len(panels) == 5
    for axes, name in zip(panels, names, strict=True):
        for place, each in enumerate(stored["models"].values()):
            assert points(axes, COLOURS[place]) == {tuple(each[name]["mean"])}
            low, quarter, median, most, high = each[name]["quantiles"]
            drawn = [tuple(line.get_xdata()) for line in axes.lines]
            assert (low, high) in drawn and (median, median) in drawn
            box = axes.patches[place]
            assert box.get_x() == quarter and box.get_width() == pytest.approx(most - quarter)
    assert "53.8 ± 9.0" in " ".join(figure._supxlabel.get_text().split())


def test_a_contact_sheet_holds_boxes_maps_and_words(tmp_path: Path) -> None:
    samples = []
    for name, size in (("wide", (80, 20)), ("high", (20, 80))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
        seen = {"grid": [1, 2], "values": [0.0, 1.0], "in_box": 0.25, "answer": f"{name} $5", "correct": name == "wide"}
        samples.append(
            {
                "image": str(tmp_path / f"{name}.png"), "question": "What? " * 60, "answer": "gold",
                "boxes": [[0.5, 0, 1, 1]], "models": {"m": seen, "n": seen | {"in_box": None, "answer": ""}},
            }
        )  # fmt: skip
    figure, _ = written("overlay", {"samples": samples}, tmp_path)
    assert len(figure.axes) == 2 * 3
    words = [text.get_text() for text in figure.texts]
    assert words[:3] == ["image", "m", "n"]
    assert {"✓ wide $5 · 0.25 in box", "✗ high $5 · 0.25 in box", "✓ (nothing)", "✗ (nothing)"} <= set(words)
    plain, mapped, _ = figure.axes[:3]
    pixels = mapped.images[0].get_array()
    assert plain.images[0].get_array()[0, 0].tolist() == [255, 0, 0]
    assert pixels[:, -1].mean() > pixels[:, 0].mean()  # the heat is on the right
    box = plain.patches[1]
    assert (box.get_x(), box.get_width()) == (pixels.shape[1] / 2 - 0.5, pixels.shape[1] / 2)
    boxes = [axes.get_position() for axes in figure.axes]
    assert boxes[0].height < boxes[3].height / 2  # a wide image takes no more room than it needs
    assert all(each.x0 >= 0 and each.x1 <= 1 and each.y0 >= 0 and each.y1 <= 1 for each in boxes)
    questions = [text for text in figure.texts if text.get_text().startswith("Q: ")]
    assert all(text.get_text().count("\n") == 2 and "…" in text.get_text() for text in questions)
