"""The micro-lab's study, read from its records: one table of arms, and one picture of what each arm changes.

Runs of one seed began alike (initialisation, order of the data), so arms are compared run by run: intervals and p
values are of paired runs on the same questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from laavit.evaluation.statistics import Pooled, holm, pooled
from laavit.registry import UserError, nearest
from laavit.reports.rows import groups
from laavit.reports.table import EMPTY, Cell, Table
from laavit.reports.tables import between, percent, points
from laavit.sweeps.table import Column, Row, by_seed, difference, evaluations, matrix

ALL: Column = ("all", None, None)
#: points that an axis shows at least, on both sides of zero
LEAST = 5.0


@dataclass(frozen=True)
class Compared:
    """An arm's figures.

    Args:
        shares: by column, pooled over seeds. gains: by reference, on all questions; None against itself.
        masked: latents off - on, of the same runs; None where that was not evaluated.
        gained, lost: seed by seed, over the first reference and when the latents are masked.
    """

    row: Row
    shares: Sequence[Pooled]
    gains: Sequence[Pooled | None]
    masked: Pooled | None
    gained: Sequence[float] = ()
    lost: Sequence[float] = ()


def compared(rows: Sequence[Row], references: Sequence[str]) -> tuple[list[Column], list[Compared]]:
    """Every arm with its latents on, against the references.

    Raises:
        UserError: a reference is no arm of the record.
    """
    on = [row for row in rows if row.mode == "on" and row.seeds]
    off = {row.arm: row for row in rows if row.mode == "off" and row.seeds}
    by_arm = {row.arm: row for row in on}
    for name in references:
        if name not in by_arm:
            raise UserError(f"the record has no arm '{name}'; {nearest(name, by_arm)}")
    columns = [ALL, *groups(evaluations(on))[1:]]
    found = []
    for row in track(on, "intervals", console=Console(stderr=True), transient=True):
        shares = [pooled(matrix(row.answers(column))) for column in columns]
        gains = [difference(row, by_arm[name], ALL) for name in references]
        masked, first = off.get(row.arm), by_arm[references[0]]
        lost = by_seed(masked, row, ALL) if masked else ()
        found.append(
            Compared(
                row, shares, gains, difference(masked, row, ALL) if masked else None, by_seed(row, first, ALL), lost
            )
        )
    return columns, found


def study_table(title: str, rows: Sequence[Row], references: Sequence[str]) -> Table:
    """Accuracy of every arm, what it gains over each reference, and what masking its latents costs it."""
    columns, found = compared(rows, references)
    labels = {one.row.arm: one.row.label for one in found}
    adjusted: dict[tuple[int, int], float] = {}
    for i in range(len(references)):
        asked = [(place, one.gains[i]) for place, one in enumerate(found)]
        ps = [(place, gain.tested) for place, gain in asked if gain is not None]
        adjusted |= {(place, i): p for (place, _), p in zip(ps, holm([p for _, p in ps]))}
    body = []
    for place, one in enumerate(found):
        row = one.row
        seeds = f"{len(row.seeds)}" + (f" of {row.planned}" if len(row.seeds) < row.planned else "")
        cells = [Cell(row.label, source=row.arm), Cell(seeds)]
        head, *kinds = one.shares
        low, high = max(head.low, 0.0), min(head.high, 1.0)  # of few seeds a t interval knows no bounds
        cells.append(Cell(percent(head.mean), between(low, high), row.arm, value=head.mean))
        cells += [Cell(percent(share.mean), source=row.arm, value=share.mean) for share in kinds]
        cells.append(_gain(one.masked, row.arm))
        for i, gain in enumerate(one.gains):
            p = adjusted.get((place, i))
            cells.append(_gain(gain, row.arm, "" if p is None else f" p {'< 0.001' if p < 1e-3 else f'= {p:.3f}'}"))
        body.append(cells)
    sizes = sorted({one.shares[0].n for one in found})
    heads = ["arm", "seeds", "all [95 %]", *(title for title, _, _ in columns[1:]), "masked − on"]
    notes = [
        f"Per cent correct, the mean over seeds ({', '.join(map(str, sizes))} questions each); intervals are for new "
        "seeds and new questions. Differences are in points, of the same seeds on the same questions; p by "
        "bootstrap, adjusted by Holm over the arms of a column. Masked: the same runs, their latents cut out of "
        "attention at inference."
    ]
    if any(len(one.row.seeds) == 1 for one in found):
        notes.append("An arm of one seed is compared with that seed's runs, and its intervals leave other seeds out.")
    return Table(title, [*heads, *(f"− {labels[name]}" for name in references)], body, notes)


def _gain(gain: Pooled | None, source: str, after: str = "") -> Cell:
    if gain is None:
        return Cell(EMPTY)
    low, high = max(gain.low, -1.0), min(gain.high, 1.0)  # a t interval knows no bounds
    return Cell(points(gain.mean), between(low, high, points) + after, source, value=gain.mean)


def draw(title: str, rows: Sequence[Row], reference: str, file: Path) -> Path:
    """A forest plot: what each arm gains over the reference, and what masking its latents changes.

    Bars are 95 % intervals for new seeds (of one seed: for new questions, drawn dashed), small dots single seeds.
    """
    _, found = compared(rows, [reference])
    label = next(one.row.label for one in found if one.row.arm == reference)
    shown = [one for one in found if one.gains[0] is not None]
    figure = Figure(figsize=(9.5, 1.4 + 0.3 * len(shown)), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    both = any(one.masked is not None for one in shown)
    ratios = (3, 2) if both else (1,)
    axes: Any = figure.subplots(1, len(ratios), sharey=True, width_ratios=ratios, squeeze=False)[0]
    places = np.arange(len(shown))[::-1]
    gains = [(one.gains[0], one.gained) for one in shown]
    _forest(axes[0], places, gains, "#1f5fa8", f"points over {label}")
    if both:
        masked = [(one.masked, one.lost) for one in shown]
        _forest(axes[1], places, masked, "#b8432f", "points when the latents are masked")
    axes[0].set_yticks(places, [one.row.label for one in shown])
    figure.suptitle(title, fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return file


def _forest(
    axis: Any, places: Any, gains: Sequence[tuple[Pooled | None, Sequence[float]]], colour: str, title: str
) -> None:
    axis.axvline(0, color="0.6", linewidth=1)
    seen = [100 * each for _, seeds in gains for each in seeds]
    for place, (gain, seeds) in zip(places, gains):
        if gain is None:
            continue
        style = "-" if len(seeds) > 1 else (0, (2, 1.5))
        axis.plot(
            [100 * gain.low, 100 * gain.high], [place] * 2, color=colour, linewidth=2, alpha=0.45, linestyle=style
        )
        axis.plot([100 * each for each in seeds], [place] * len(seeds), "o", color=colour, markersize=2.5, alpha=0.7)
        axis.plot(100 * gain.mean, place, "o", color=colour, markersize=5)
    # Tenths of a point shall not look like much, and the interval of two seeds shall not hide all others.
    low, high = axis.get_xlim()
    widest = 2 * max([LEAST, *map(abs, seen)])
    axis.set_xlim(max(min(low, -LEAST), -widest), min(max(high, LEAST), widest))
    axis.set_title(title, fontsize=10)
    axis.tick_params(labelsize=9)
    axis.grid(axis="x", color="0.92")
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
