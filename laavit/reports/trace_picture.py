"""One trace as a picture: each image, the aggregate map over it with the boxes, and a strip of the steps."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from laavit.files import write_bytes
from laavit.images import open_image
from laavit.reports.figures import blend
from laavit.structures import Sample, Trace
from laavit.traces.grids import image_map, in_box_mass, sample_mask

#: columns of the strip, inches of a panel, the colour of the boxes
COLUMNS, INCHES, BOX = 4, 2.9, "#00e5ff"
#: steps drawn; a long answer token by token has more than a picture can show
MOST_STEPS = 24
#: pixels of a panel's longer side
SIDE = 448

Panel = tuple[str, int, Tensor | None]  # title, image, map [N]


def panels(trace: Trace, images: int) -> tuple[list[Panel], list[Panel]]:
    """What is drawn: each image plain and with the aggregate map; each step on the image that it looks at most."""
    numbered = images > 1
    top: list[Panel] = []
    for image in range(images):
        name = f"image {image + 1}" if numbered else "image"
        top += [(name, image, None), (f"gaze, {name}" if numbered else "gaze", image, trace.gaze)]
    strip: list[Panel] = []
    for place, step in enumerate(trace.steps[:MOST_STEPS], 1):
        image = max(range(images), key=lambda i: float(image_map(step.gaze, trace.tiles, i).sum()))
        group = f" ({step.group})" if step.group else ""
        where = f" · image {image + 1}" if numbered else ""
        strip.append((f"{place} {step.text.strip()!r}{group}{where}", image, step.gaze))
    return top, strip


def share(trace: Trace, sample: Sample, gaze: Tensor) -> float | None:
    """The share of a map inside the sample's boxes; None without boxes or mass."""
    if not sample.boxes or not bool(gaze.sum() > 0):
        return None
    gaze = gaze.double()
    return float(in_box_mass(gaze, sample_mask(sample.boxes, trace.tiles, gaze.dtype)))


def draw_trace(sample: Sample, trace: Trace, path: Path) -> Path:
    """Write a trace's picture as PNG.

    Raises:
        UserError: an image of the sample cannot be read.
    """
    pictures = [open_image(image) for image in sample.images]
    top, strip = panels(trace, len(pictures))
    top_columns = min(COLUMNS, len(top))
    rows = -(-len(top) // top_columns) + -(-len(strip) // COLUMNS)
    columns = max(top_columns, min(COLUMNS, len(strip)), 2)
    words = _words(sample, trace, width=42 * columns)
    head = 0.16 + 0.175 * (words.count("\n") + 1)
    figure = Figure(figsize=(INCHES * columns, head + (INCHES + 0.3) * rows), layout=None)
    FigureCanvasAgg(figure)
    figure.text(0.012, 1 - 0.08 / figure.get_figheight(), words, va="top", fontsize=9, linespacing=1.35)
    places = [divmod(i, top_columns) for i in range(len(top))]
    places += [(-(-len(top) // top_columns) + i // COLUMNS, i % COLUMNS) for i in range(len(strip))]
    for (row, column), (title, image, gaze) in zip(places, top + strip, strict=True):
        inches = (INCHES * column + 0.06, figure.get_figheight() - head - (INCHES + 0.3) * (row + 1) + 0.04)
        size = (INCHES - 0.12, INCHES - 0.04)
        wide, high = figure.get_figwidth(), figure.get_figheight()
        axes = figure.add_axes((inches[0] / wide, inches[1] / high, size[0] / wide, size[1] / high))
        _draw(axes, pictures[image], sample, trace, gaze, image)
        inside = share(trace, sample, gaze) if gaze is not None else None
        said = textwrap.shorten(title, 40, placeholder="…")
        axes.set_title(
            said if inside is None else f"{said}: {inside:.2f} in boxes", fontsize=8, pad=3, parse_math=False
        )
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    write_bytes(path, stream.getvalue())
    return path


def _words(sample: Sample, trace: Trace, width: int) -> str:
    lines = [f"{trace.sample_id}   {sample.source}", f"Q: {sample.question}", f"gold: {sample.answer}"]
    lines.append(f"teacher: {trace.answer}")
    if trace.blind_answer is not None:
        lines.append(f"without the image: {trace.blind_answer}")
    if verdicts := _verdicts(trace):
        lines.append(verdicts)
    if len(trace.steps) > MOST_STEPS:
        lines.append(f"the first {MOST_STEPS} of {len(trace.steps)} steps")
    shown = [textwrap.shorten(line, 3 * width, placeholder=" …") for line in lines]
    # the words are data: a dollar sign is no formula
    return "\n".join("\n".join(textwrap.wrap(line, width)) for line in shown).replace("$", r"\$")


def _verdicts(trace: Trace) -> str:
    scores = {name: f" {value:.2f}" for name, value in trace.scores.items() if not np.isnan(value)}
    return "  ".join(f"{name}: {'pass' if ok else 'fail'}{scores.get(name, '')}" for name, ok in trace.verdicts.items())


def _draw(axes: Axes, picture: Image.Image, sample: Sample, trace: Trace, gaze: Tensor | None, image: int) -> None:
    heat = None if gaze is None else image_map(gaze, trace.tiles, image).to(torch.float64).numpy()
    shown = blend(picture, heat, SIDE)
    axes.imshow(np.asarray(shown), interpolation="nearest")
    axes.set_axis_off()
    for box in _boxes(sample, image):
        x, y, width, height = box[0] * shown.width, box[1] * shown.height, box[2] * shown.width, box[3] * shown.height
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor="black", linewidth=2.6))
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=BOX, linewidth=1.4))


def _boxes(sample: Sample, image: int) -> Sequence[tuple[float, float, float, float]]:
    """x, y, width, height of the boxes on an image, normalised."""
    return [(b.x1, b.y1, b.x2 - b.x1, b.y2 - b.y1) for b in sample.boxes if b.image == image]
