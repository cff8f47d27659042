"""Figures: what is drawn where, and in whose colours."""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from laavit.reports.figures import (
    accuracy_panels,
    colours,
    curve_panels,
    logged_keys,
    overlay,
    running_mean,
    share_in_boxes,
)
from laavit.reports.rows import result_rows
from laavit.reports.runs import load_runs


def pixels(uri: str) -> np.ndarray:
    raw = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
    return np.asarray(Image.open(io.BytesIO(raw))).astype(int)


def test_every_panel_follows_the_page_s_colours(make_runs: Callable[[], list[Path]]) -> None:
    runs = load_runs(make_runs())
    colour = colours([run.label for run in runs])
    panels = accuracy_panels(result_rows(runs), colour) + curve_panels(runs, colour)
    assert [panel.title for panel in panels[5:]] == [
        "total loss",
        "answer loss (next token)",
        "concept loss, 1 − cos (Eq. 6)",
        "trajectory loss, KL (Eq. 7)",
        "gate γ(t) (Eq. 5)",
        "learning rate",
    ]
    for panel in panels:
        opening = panel.svg[: panel.svg.index(">")]
        assert (
            'class="plot"' in opening and "viewBox" in opening and "width=" not in opening and "height=" not in opening
        )
        assert "var(--ink)" in panel.svg and "var(--c2)" in panel.svg
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", panel.svg)) == set(), "a colour that no dark page can change"


def test_other_logged_figures_are_drawn_and_housekeeping_is_not(make_runs: Callable[[], list[Path]]) -> None:
    paths = make_runs()
    (paths[1] / "log.jsonl").write_text('{"iter": 1, "ntp": 1.0, "time": 2, "mystery": 3, "mode": "train"}\n')
    assert logged_keys(load_runs(paths)[1:2]) == ["ntp", "mystery"]


def test_figures_of_the_machine_and_of_parts_are_left_to_the_log(make_runs: Callable[[], list[Path]]) -> None:
    paths = make_runs()
    lines = [
        '{"iter": 1, "ntp": 1.0, "grad_norm": 2.0, "grad_norm/decoder": 1.0, "target_grad/concept": 0.1, "mfu": 0.4}',
        '{"iter": 2, "ntp": 0.9, "samples_per_second": 3, "tokens_per_second": 9, "host_memory_gb": 1.0}',
        '{"iter": 3, "ntp": null, "probe/ntp": 1.5, "probe/in_box": 0.25, "probe/mine": null}',
    ]
    (paths[1] / "log.jsonl").write_text("\n".join(lines) + "\n")
    [run] = load_runs(paths)[1:2]
    assert logged_keys([run]) == ["ntp", "probe/ntp", "probe/in_box", "grad_norm"]
    titles = [panel.title for panel in curve_panels([run], colours([run.label]))]
    assert titles[1:3] == ["held out: answer loss", "held out: attention inside the boxes (S_focus)"]


def test_running_mean_against_its_definition() -> None:
    values = np.arange(6.0) ** 2
    expected = [values[max(0, i - 2) : i + 1].mean() for i in range(6)]
    np.testing.assert_allclose(running_mean(values, 3), expected)


def test_share_in_boxes() -> None:
    gaze = np.zeros((2, 4))
    gaze[0, 0], gaze[1, 3] = 3, 1
    assert share_in_boxes(gaze, [(0, 0, 0.25, 0.5)]) == pytest.approx(0.75)
    # x runs along the columns of a wide grid: a transposed map would say something else
    assert share_in_boxes(gaze, [(0.75, 0.5, 1, 1)]) == pytest.approx(0.25)
    assert share_in_boxes(gaze, []) is None and share_in_boxes(np.zeros((2, 2)), [(0, 0, 1, 1)]) is None


def test_the_bright_spot_lies_where_the_map_is() -> None:
    gaze = np.zeros((2, 4))
    gaze[1, 3] = 1
    image = Image.new("RGB", (80, 40), (30, 60, 90))
    picture = pixels(overlay(image, gaze, side=160))
    assert picture.shape == (80, 160, 3)
    change = np.abs(picture - pixels(overlay(image, np.zeros((2, 4)), side=160))).sum(-1)
    assert change[60:, 140:].mean() > 100 and change[:30, :100].max() < 12


def test_the_plain_image_is_left_as_it_is() -> None:
    image = Image.new("RGB", (10, 20), (200, 30, 60))
    picture = pixels(overlay(image, None, side=40))
    assert picture.shape == (40, 20, 3) and np.abs(picture - [200, 30, 60]).max() <= 3
