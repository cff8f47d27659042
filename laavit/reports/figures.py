"""Figures as inline SVG that follows the page's light or dark colours, and gaze overlays as data URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from laavit.images import open_image
from laavit.reports.rows import Row, groups, of_all
from laavit.reports.runs import GazeSample, Run
from laavit.structures import Box
from laavit.traces.grids import boxes_to_mask, in_box_mass

#: matplotlib draws in these colours, which the SVG then replaces by the page's own.
INK, LINE, CARD = "#010101", "#020202", "#040404"
SERIES = [f"#0300{i:02x}" for i in range(8)]
_VARIABLES = {
    INK: "var(--ink)",
    LINE: "var(--line)",
    CARD: "var(--card)",
    **{c: f"var(--c{i})" for i, c in enumerate(SERIES)},
}

#: Small panels side by side rather than one wide figure: they stay readable at the width of a phone.
PANEL = (3.9, 2.5)

#: What the known keys of log.jsonl are called, in the order in which they are shown.
LOGGED = {
    "loss": "total loss",
    "ntp": "answer loss (next token)",
    "concept": "concept loss, 1 − cos (Eq. 6)",
    "trajectory": "trajectory loss, KL (Eq. 7)",
    "gaze_kl": "KL from the teacher's gaze",
    "gamma": "gate γ(t) (Eq. 5)",
    "gamma_answer": "gate γ(t), answer → image",
    "gamma_question": "gate γ(t), question → image",
    "gamma_latent": "gate γ(t), latent → image",
    "lr": "learning rate",
    "probe/ntp": "held out: answer loss",
    "probe/concept": "held out: concept loss",
    "probe/trajectory": "held out: trajectory loss, KL",
    "probe/in_box": "held out: attention inside the boxes (S_focus)",
    "grad_norm": "norm of the gradient, before clipping",
}
#: Logged keys that say nothing about learning.
_HOUSEKEEPING = {
    *("iter", "step", "epoch", "time", "data_time", "seconds", "data_seconds", "data_share", "step_seconds"),
    *("eta", "memory", "samples_per_second", "tokens_per_second", "mfu", "memory_gb", "host_memory_gb"),
}
#: and the beginnings of such keys, of which a run logs many
_PARTS = ("grad_norm/", "target_grad/")


@dataclass(frozen=True)
class Figured:
    """One drawn panel: its title and the SVG element."""

    title: str
    svg: str


def to_svg(figure: Figure, salt: str) -> str:
    """The figure as an ``<svg>`` element with real text, no fixed size, and colours from the page."""
    FigureCanvasSVG(figure)
    stream = io.StringIO()
    # ids are hashed with the salt, so that several inline figures never share a clip path
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg ([^>]*?)(?:width|height)="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)(?:width|height)="[^"]*"', r'\1class="plot" role="img"', text, count=1)
    text = re.sub(
        r'<g id="[^"]*"', "<g", text
    )  # matplotlib names its groups alike in every figure; nothing refers to them
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def new_panel(height: float = PANEL[1], left: float = 0.13, right: float = 0.97) -> tuple[Figure, mpl.axes.Axes]:
    """An empty panel in the page's style; the margins are shares of its width."""
    figure = Figure(figsize=(PANEL[0], height))
    axes = figure.add_axes((left, 0.42 / height, right - left, 1 - 0.5 / height))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=INK, labelsize=8.5, length=0, pad=4)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def colours(runs: Sequence[str]) -> dict[str, str]:
    """A run's label -> its colour on every figure of the page."""
    return {label: SERIES[i % len(SERIES)] for i, label in enumerate(runs)}


def accuracy_panels(rows: Sequence[Row], colour: Mapping[str, str]) -> list[Figured]:
    """One panel for each group of questions: every model's accuracy with its 95 % interval."""
    panels = []
    limits = _common_limits(rows)
    for number, (title, task, kind) in enumerate(groups(of_all(rows))):
        figure, axes = new_panel(height=0.62 + 0.3 * len(rows), left=0.36, right=0.95)
        for y, row in enumerate(reversed(rows)):
            if (one := row.score(task, kind)) is None:
                continue
            own: dict[str, Any] = {"color": colour[row.run], "clip_on": False}  # a dot at 100 is a whole one
            axes.plot([100 * one.low, 100 * one.high], [y, y], linewidth=2.2, solid_capstyle="round", **own)
            axes.plot(
                100 * one.mean, y, "o", markersize=6.5, markerfacecolor=CARD if row.evaluation.way else None, **own
            )
        axes.set_yticks(range(len(rows)), [shortened(row.label) for row in reversed(rows)], color=INK)
        axes.set_xlim(*limits)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        panels.append(Figured(f"{title}, % correct", to_svg(figure, f"accuracy-{number}")))
    return panels


def _common_limits(rows: Sequence[Row]) -> tuple[float, float]:
    """One range of per cent for all panels, so that they can be compared by eye."""
    scores = [row.score(task, kind) for row in rows for _, task, kind in groups(of_all(rows))]
    known = [one for one in scores if one]
    return max(0.0, 100 * min(one.low for one in known) - 3), min(100.0, 100 * max(one.high for one in known) + 3)


def shortened(label: str, limit: int = 20) -> str:
    """A label that fits beside an axis."""
    return label if len(label) <= limit else label[: limit - 1] + "…"


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of the last ``window`` values (of as many as there are, at the start): [T] -> [T]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(0, stop - window)
    return (sums[stop] - sums[start]) / (stop - start)


def logged_keys(runs: Sequence[Run]) -> list[str]:
    """The keys of the logs that are drawn: the known ones first, then whatever else was logged as a number."""
    found = {
        key
        for run in runs
        for entry in run.log
        for key, value in entry.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
        if key not in _HOUSEKEEPING and not key.startswith(_PARTS)
    }
    return [key for key in LOGGED if key in found] + sorted(found - set(LOGGED))


def curve_panels(runs: Sequence[Run], colour: Mapping[str, str]) -> list[Figured]:
    """One panel for each logged quantity over the steps: faint as logged, strong as a mean over 5 % of the steps."""
    panels = []
    for key in logged_keys(runs):
        figure, axes = new_panel(left=0.19 if key == "lr" else 0.15)
        for run in runs:
            points = [(entry["iter"], entry[key]) for entry in run.log if isinstance(entry.get(key), int | float)]
            if not points:
                continue
            steps, values = (np.asarray(part, dtype=np.float64) for part in zip(*points, strict=True))
            if key == "lr" or key.startswith("gamma"):  # schedules have no noise to smooth
                axes.plot(steps, values, color=colour[run.label], linewidth=2)
                continue
            axes.plot(steps, values, color=colour[run.label], linewidth=0.8, alpha=0.28)
            smooth = running_mean(values, max(1, len(values) // 20))
            axes.plot(steps, smooth, color=colour[run.label], linewidth=2, solid_capstyle="round")
        axes.locator_params(nbins=5)
        if key == "lr":
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        axes.set_xlabel("step", color=INK, fontsize=8.5, labelpad=2)
        panels.append(Figured(LOGGED.get(key, key), to_svg(figure, f"curve-{key}")))
    return panels


def share_in_boxes(gaze: NDArray[np.float64], boxes: Sequence[tuple[float, float, float, float]]) -> float | None:
    """S_focus of one map (Sec. 3.1): [h, w] -> its mass inside the boxes; None without boxes or without mass."""
    if not boxes or not gaze.sum() > 0:
        return None
    height, width = gaze.shape
    mask = boxes_to_mask([Box(*box) for box in boxes], height, width, dtype=torch.float64)
    return float(in_box_mass(torch.from_numpy(gaze).flatten(), mask))


def blend(image: Image.Image, gaze: NDArray[np.float64] | None, side: int = 336) -> Image.Image:
    """The image, greyed and overlaid with a map; the plain image where there is no map.

    The map is scaled to its own maximum and interpolated bilinearly from its grid (App. C.2): the colour says where
    the looking goes, not how much of it there is.

    Args:
        gaze: [h, w], not negative. side: the longer side of the picture in pixels; small images are enlarged.
    """
    image = image.convert("RGB")
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    picture = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
    if gaze is not None:
        strength = gaze / gaze.max() if gaze.max() > 0 else np.zeros_like(gaze)
        heat = Image.fromarray(strength.astype(np.float32), mode="F").resize(size, Image.Resampling.BILINEAR)
        heat_values = np.asarray(heat).clip(0, 1)
        pixels = np.asarray(picture, dtype=np.float64) / 255
        grey = pixels @ np.array([0.299, 0.587, 0.114])
        muted = 0.45 * pixels + 0.55 * (0.25 + 0.6 * grey[..., None])
        coloured = mpl.colormaps["inferno"](0.15 + 0.85 * heat_values)[..., :3]
        alpha = (0.12 + 0.56 * heat_values)[..., None]
        picture = Image.fromarray((255 * ((1 - alpha) * muted + alpha * coloured)).round().astype(np.uint8))
    return picture


def overlay(image: Image.Image, gaze: NDArray[np.float64] | None, side: int = 336) -> str:
    """``blend`` as a data URI."""
    stream = io.BytesIO()
    blend(image, gaze, side).save(stream, format="JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def gaze_figures(sample: GazeSample, names: Sequence[str]) -> list[tuple[str, str, float | None]]:
    """(who, overlay as a data URI, share of the map inside the boxes) for the plain image and each map of a sample."""
    image = open_image(sample.image)  # upright, as the models saw it
    found: list[tuple[str, str, float | None]] = [("image", overlay(image, None), None)]
    for name in names:
        if name in sample.maps:
            gaze = sample.maps[name]
            found.append((name, overlay(image, gaze), share_in_boxes(gaze, sample.boxes)))
    return found
