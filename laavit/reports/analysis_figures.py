"""The analyses as pictures (LaViT, Fig. 2-5): each is drawn from its JSON data, and from nothing else."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from PIL import Image

from laavit.files import write_bytes
from laavit.images import open_image
from laavit.reports.figures import blend
from laavit.traces.tagger import GROUPS

#: of models, in their order; told apart in the common kinds of colour blindness (Okabe and Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b5b")
GREY, BOX = "#777777", "#00e5ff"
#: measure -> title (Table 2)
MEASURES = {
    "entropy": "entropy H (nats)",
    "entropy_share": "H / ln N",
    "salient": "salient regions (> 1.5 × mean)",
    "salient_share": "salient regions / N",
    "cv": "CV (σ / μ)",
    "in_box": "share in boxes, S_focus",
}
#: inches of a panel of a contact sheet, pixels of its longer side
INCHES, SIDE = 2.3, 448


def write_figure(name: str, result: Mapping[str, Any], path: Path) -> Path:
    """Draw an analysis and write it as PNG."""
    stream = io.BytesIO()
    figure = DRAWN[name](result)
    figure.savefig(stream, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    write_bytes(path, stream.getvalue())
    return path


def _figure(columns: Sequence[float], height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, their widths in inches."""
    figure = Figure(figsize=(sum(columns), height * rows), layout=ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09))
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, len(columns), squeeze=False, gridspec_kw={"width_ratios": columns})
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8.5)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, list(panels.flat)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=9.5, loc="left", parse_math=False)


def _plain(names: Sequence[str], limit: int = 26) -> list[str]:
    """Labels: names are data, a dollar sign in them is no formula."""
    return [textwrap.shorten(name, limit, placeholder="…").replace("$", r"\$") for name in names]


def _point(
    axes: Axes, y: float, interval: Sequence[float] | None, colour: str, hollow: bool = False, label: str = ""
) -> None:
    """A figure with its interval, lying; nothing where there is none."""
    if interval is not None:
        mean, low, high = interval
        axes.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="round", zorder=2)
        fill = "white" if hollow else colour
        axes.plot([mean], [y], "o", color=colour, markersize=6.5, markerfacecolor=fill, zorder=3, label=label or None)


def _names(axes: Axes, names: Sequence[str]) -> None:
    """Rows of a panel, from the top down."""
    axes.set_yticks(range(len(names)), _plain(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = min(len(labels), 5)
        figure.legend(handles, _plain(labels, 40), loc="outside lower left", ncols=columns, fontsize=8.5, frameon=False)


def draw_focus(result: Mapping[str, Any]) -> Figure:
    """Fig. 2: S_focus of right and wrong answers, their difference by kind of question, accuracy over the threshold."""
    models: Mapping[str, Any] = result["models"]
    kinds = sorted({kind for each in models.values() for kind in each["by_kind"]})
    rows = ["all samples", *(["within kinds", *kinds] if len(kinds) > 1 else [])]
    height = max(2.9, 1.1 + 0.23 * max(len(rows) * (1 + len(models)) / 2, 2 * len(models)))
    figure, (groups, contrasts, curves) = _figure((4.2, 4.2, 4.2), height)
    names = []
    for place, (name, each) in enumerate(models.items()):
        colour = COLOURS[place % len(COLOURS)]
        for offset, key in enumerate(("focus_correct", "focus_wrong")):
            _point(groups, 2 * place + offset, each[key], colour, hollow=offset == 1)
            count = each["n"] - each["right"] if offset else each["right"]
            names.append(f"{name}: {count} {('right', 'wrong')[offset]}")
        shift = 0.7 * ((place + 0.5) / len(models) - 0.5)
        shown = [each, each["within"], *(each["by_kind"].get(kind) for kind in kinds)]
        for row, one in enumerate(shown[: len(rows)]):
            _point(contrasts, row + shift, one and one["difference"], colour)
        steps = [point for point in each["curve"] if point["accuracy"] is not None]
        x = [point["threshold"] for point in steps]
        mean, low, high = np.transpose([point["accuracy"] for point in steps])
        curves.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        curves.plot(x, mean, color=colour, linewidth=2, marker="o", markersize=3, label=name)
    _names(groups, names)
    _names(contrasts, rows)
    contrasts.axvline(0, color=GREY, linewidth=1, linestyle="--")
    _title(groups, "mean S_focus (right ●, wrong ○)")
    _title(contrasts, "S_focus of right − wrong answers")
    _title(curves, "accuracy where S_focus ≥ threshold")
    contrasts.set_xlabel("no dot: fewer than 5 right or wrong answers", fontsize=8, color=GREY)
    curves.set_xlabel("threshold", fontsize=8)
    _legend(figure, curves)
    return figure


def draw_gap(result: Mapping[str, Any]) -> Figure:
    """Fig. 3: KL of the maps, and distances of the states, by token group; the paper's figures beside them."""
    students: Mapping[str, Any] = result["students"]
    cosine = any(each["cosine"] is not None for each in students.values())
    shown = {"kl": f"KL({result['teacher']} ‖ student), nats"}
    shown |= {"cosine": "cosine distance of states"} if cosine else {}
    shown |= {"cka_distance": "1 − CKA of states"}
    figure, panels = _figure([4.0] * len(shown), max(2.7, 1.4 + 0.2 * (len(students) + 1) * 3))
    first = next(iter(students.values()))
    names = [f"{group} ({first['tokens'][group]})" for group in GROUPS]
    for axes, (measure, title) in zip(panels, shown.items(), strict=True):
        for place, (name, each) in enumerate(students.items()):
            for row, group in enumerate(GROUPS):
                shift = 0.6 * ((place + 0.5) / len(students) - 0.5)
                value = (each[measure] or {}).get(group)
                _point(axes, row + shift, value, COLOURS[place % len(COLOURS)], label="" if row else name)
        if measure == "kl":
            for group, value in result["paper"]["kl"].items():
                axes.plot([value], [GROUPS.index(group)], "D", color=GREY, markerfacecolor="white", markersize=6)
        if measure == "cosine":
            axes.axvspan(*result["paper"]["cosine"], color=GREY, alpha=0.25, linewidth=0)
        _names(axes, names)
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))
        _title(axes, title)
    band, why = (" and grey band", "") if cosine else ("", " No cosine: the models' widths differ.")
    words = f"◇{band}: the paper (32B teacher, 3B student; Visual-CoT).{why}"
    panels[0].set_xlabel(words, fontsize=7.5, loc="left", color=GREY)
    _legend(figure, panels[0])
    return figure


def draw_attention(result: Mapping[str, Any]) -> Figure:
    """Table 2, Fig. 4: how each measure is spread over samples (5, 25, 50, 75, 95 %), and its mean with interval."""
    models: Mapping[str, Any] = result["models"]
    shown = {key: title for key, title in MEASURES.items() if any(key in each for each in models.values())}
    columns = 3 if len(shown) == 6 else len(shown)
    figure, panels = _figure([4.0] * columns, max(1.7, 0.75 + 0.36 * len(models)), rows=len(shown) // columns)
    for axes, (measure, title) in zip(panels, shown.items(), strict=True):
        for place, each in enumerate(models.values()):
            if measure not in each:
                continue
            colour = COLOURS[place % len(COLOURS)]
            low, quarter, median, most, high = each[measure]["quantiles"]
            axes.plot([low, high], [place, place], color=colour, linewidth=1, alpha=0.6, zorder=1)
            axes.barh(place, most - quarter, left=quarter, height=0.5, color=colour, alpha=0.25, linewidth=0, zorder=1)
            axes.plot([median, median], [place - 0.25, place + 0.25], color=colour, linewidth=1.4, zorder=2)
            _point(axes, place, each[measure]["mean"], colour)
        _names(axes, list(models))
        _title(axes, title)
    paper = result["paper"]
    said = [
        f"{name} {each['salient'][0]} ± {each['salient'][1]} regions, H {each['entropy'][0]:.3f} ± {each['entropy'][1]}"
        for name, each in paper.items()
        if name != "data"
    ]
    words = f"Dot: mean, 95 % interval. Bar: 25 to 75 % of samples, line: 5 to 95 %. Paper ({paper['data']}): "
    figure.supxlabel("\n".join(textwrap.wrap(words + "; ".join(said), 58 * columns)), fontsize=7.5, color=GREY, x=0.5)
    return figure


def draw_overlay(result: Mapping[str, Any]) -> Figure:
    """Fig. 5: a row for each sample (image, then every model's map), its question and gold answer above."""
    samples: Sequence[Mapping[str, Any]] = result["samples"]
    names = list(dict.fromkeys(name for sample in samples for name in sample["models"]))
    columns = 1 + len(names)
    wide = INCHES * columns
    pictures = [open_image(Path(sample["image"])) for sample in samples]
    captions = [_caption(sample, int(15 * wide)) for sample in samples]
    heads = [0.08 + 0.145 * (caption.count("\n") + 1) for caption in captions]
    panels = [INCHES * min(1.0, picture.height / picture.width) for picture in pictures]  # no room beside wide ones
    below, top = 0.3, 0.3  # inches of the words under a panel, and of the columns' names
    high = top + sum(heads) + sum(panels) + len(samples) * below
    figure = Figure(figsize=(wide, high))
    FigureCanvasAgg(figure)

    def write(x: float, y: float, words: str, **how: Any) -> None:
        figure.text(x / wide, y / high, words, parse_math=False, **how)

    for column, name in enumerate(["image", *names]):
        words = textwrap.shorten(name, 26, placeholder="…")
        write((column + 0.5) * INCHES, high - 0.5 * top, words, ha="center", va="center", fontsize=10, weight="bold")
    y = high - top
    for sample, picture, caption, head, panel in zip(samples, pictures, captions, heads, panels, strict=True):
        write(0.06, y - 0.03, caption, va="top", fontsize=8.5)
        y -= head + panel
        for column, given in enumerate([None, *(sample["models"].get(name) for name in names)]):
            left, size = column * INCHES + 0.04, (INCHES - 0.08, panel - 0.04)
            axes = figure.add_axes((left / wide, y / high, size[0] / wide, size[1] / high))
            _overlaid(axes, picture, given, sample["boxes"])
            if given is not None:
                colour = "#00694a" if given["correct"] else "#b03a00"
                write(
                    (column + 0.5) * INCHES, y - 0.11, _under(given), ha="center", va="center", fontsize=8, color=colour
                )
        y -= below
    return figure


def _overlaid(
    axes: Axes, picture: Image.Image, given: Mapping[str, Any] | None, boxes: Sequence[Sequence[float]]
) -> None:
    """One panel: the image, with a model's map over it where there is one, and the boxes."""
    shown = blend(picture, None if given is None else np.reshape(given["values"], given["grid"]), SIDE)
    axes.imshow(np.asarray(shown), interpolation="nearest")
    axes.set_axis_off()
    for x1, y1, x2, y2 in boxes:
        corner = (x1 * shown.width - 0.5, y1 * shown.height - 0.5)
        size = ((x2 - x1) * shown.width, (y2 - y1) * shown.height)
        for colour, line in (("black", 2.8), (BOX, 1.5)):
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=line))


def _caption(sample: Mapping[str, Any], width: int) -> str:
    """Question and gold answer, in two lines at most for each."""
    lines = [f"Q: {sample['question']}", f"gold: {sample['answer']}"]
    return "\n".join(
        "\n".join(textwrap.wrap(textwrap.shorten(line, 2 * width - 8, placeholder=" …"), width)) for line in lines
    )


def _under(given: Mapping[str, Any]) -> str:
    """What stands under a map: the answer, whether it is right, the share of the map that is inside the boxes."""
    said = textwrap.shorten(given["answer"] or "(nothing)", 18, placeholder="…")
    share = "" if given["in_box"] is None else f" · {given['in_box']:.2f} in box"
    return f"{'✓' if given['correct'] else '✗'} {said}{share}"


#: analysis -> what draws its data
DRAWN: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "focus": draw_focus,
    "gap": draw_gap,
    "attention": draw_attention,
    "overlay": draw_overlay,
}
