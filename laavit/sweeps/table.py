"""The one table of a sweep: a row for every arm (and mode of its latents), seeds pooled, differences to the reference.

Every figure is computed from the cells' ``records.jsonl`` and from nothing else.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from laavit.evaluation.statistics import Pooled, holm, pooled, pooled_difference
from laavit.files import write_text
from laavit.reports.rows import groups
from laavit.reports.runs import Evaluation, load_run
from laavit.reports.table import EMPTY, Cell, Table
from laavit.reports.tables import percent
from laavit.sweeps.plan import Plan

logger = logging.getLogger(__name__)

NAME = "table"
#: (title, task, kind); None stands for all
Column = tuple[str, str | None, str | None]


@dataclass(frozen=True)
class Row:
    """An arm in one mode, with the evaluations of all its seeds that are there.

    Args:
        planned: how many seeds it is to have. seeded: whether it hangs on the seed; a model that is evaluated as it is,
            and named without one, does not.
    """

    label: str
    arm: str
    mode: str
    seeds: Mapping[int, Evaluation]
    planned: int
    seeded: bool = True

    def answers(self, column: Column, seeds: Sequence[int] | None = None) -> dict[tuple[str, str], list[bool]]:
        """Question -> right or wrong of each of these seeds (default all); the questions that all of them answered."""
        _, task, kind = column
        seeds = sorted(self.seeds) if seeds is None else seeds
        found: dict[tuple[str, str], list[bool]] = {}
        for seed in seeds:
            for record in self.seeds[seed].records:
                if task in (None, record.task) and kind in (None, record.kind):
                    found.setdefault(record.key, []).append(record.correct)
        return {key: correct for key, correct in found.items() if len(correct) == len(seeds)}


@dataclass(frozen=True)
class Result:
    """A row's figures: by column, and the difference of all questions to the reference's."""

    row: Row
    shares: Sequence[Pooled | None]
    difference: Pooled | None


def rows_of(plan: Plan) -> list[Row]:
    """Arms in order, each in the modes that it was evaluated in."""
    found: dict[tuple[str, str], dict[int, Evaluation]] = {}
    labels: dict[tuple[str, str], str] = {}
    planned: dict[tuple[str, str], int] = {}
    trained: dict[tuple[str, str], bool] = {}
    for cell in track(plan.cells, "records", console=Console(stderr=True), transient=True):
        done = {plan.evaluation(cell, mode).name: mode for mode in plan.modes(cell) if plan.evaluated(cell, mode)}
        for mode in plan.modes(cell):
            key = (cell.arm, mode)
            found.setdefault(key, {})
            planned[key] = planned.get(key, 0) + 1
            trained[key] = cell.recipe is not None
            labels[key] = cell.label + ("" if mode == "on" else f", latents {mode}")
        for evaluation in load_run(plan.folder(cell)).evaluations if done else ():
            if evaluation.name in done:
                found[cell.arm, done[evaluation.name]][cell.seed] = evaluation
    return [
        Row(labels[key], *key, seeds, planned[key], trained[key] or planned[key] > 1) for key, seeds in found.items()
    ]


def evaluations(rows: Sequence[Row]) -> list[Evaluation]:
    """Those of every seed."""
    return [evaluation for row in rows for evaluation in row.seeds.values()]


def matrix(answers: Mapping[tuple[str, str], Sequence[bool]]) -> NDArray[np.bool_]:
    """The answers of S seeds as an array, [S, n]."""
    return np.array(list(answers.values()), dtype=bool).T


def difference(row: Row, reference: Row | None, column: Column) -> Pooled | None:
    """What a row has over another on the questions that both answered, of the seeds that both have: those runs began
    alike. A model that hangs on no seed stands beside all runs of the other. None where there is nothing to compare.
    """
    if reference is None or row is reference or not row.seeds or not reference.seeds:
        return None
    alike = sorted(row.seeds.keys() & reference.seeds.keys())
    paired = bool(alike) and row.seeded and reference.seeded
    ours = row.answers(column, alike if paired else None)
    theirs = reference.answers(column, alike if paired else None)
    both = [key for key in ours if key in theirs]
    if not both:
        return None
    first, second = (matrix({key: each[key] for key in both}) for each in (ours, theirs))
    return pooled_difference(first, second, paired=paired)


def by_seed(row: Row, reference: Row, column: Column) -> list[float]:
    """The difference of each seed that both rows have, in the order of the seeds."""
    alike = sorted(row.seeds.keys() & reference.seeds.keys())
    pairs = [(row.answers(column, [seed]), reference.answers(column, [seed])) for seed in alike]
    return [float(np.mean([ours[key][0] - theirs[key][0] for key in ours if key in theirs])) for ours, theirs in pairs]


def results_of(plan: Plan, rows: Sequence[Row], columns: Sequence[Column]) -> list[Result]:
    """Every row's figures; differences are taken to the reference arm with its latents on."""
    reference = next((row for row in rows if row.arm == plan.reference and row.mode == "on"), None)
    found = []
    for row in track(rows, "intervals", console=Console(stderr=True), transient=True):
        answers = [row.answers(column) for column in columns]
        shares = [pooled(matrix(each)) if each else None for each in answers]
        found.append(Result(row, shares, difference(row, reference, columns[0])))
    return found


def _share(one: Pooled, source: str) -> Cell:
    low, high = max(one.low, 0.0), min(one.high, 1.0)  # of few seeds a t interval knows no bounds
    interval = f"[{percent(low)}, {percent(high)}]"
    return Cell(percent(one.mean), interval, source, value=one.mean, low=low, high=high)


def _points(one: Pooled, source: str) -> Cell:
    interval = f"[{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
    return Cell(f"{100 * one.mean:+.1f}", interval, source, value=one.mean, low=one.low, high=one.high)


def table_of(plan: Plan, results: Sequence[Result], columns: Sequence[Column]) -> Table:
    """The table that people read: per cent with intervals, the difference to the reference, and Holm's p."""
    asked = max((share.n for result in results for share in result.shares[:1] if share), default=0)
    compared = [result for result in results if result.difference is not None]
    ps = dict(zip(map(id, compared), holm([one.difference.tested for one in compared if one.difference])))
    body = []
    for result in results:
        row = result.row
        source = "; ".join(evaluation.source for evaluation in row.seeds.values()) or "not run"
        cells = [Cell(row.label, source=source)]
        cells += [_share(share, source) if share else Cell(EMPTY, source="not run") for share in result.shares]
        if plan.reference is not None:
            one = result.difference
            cells.append(_points(one, source) if one else Cell(EMPTY))
            cells.append(Cell(f"{ps[id(result)]:.4f}", value=ps[id(result)]) if one else Cell(EMPTY))
        seeds = str(len(row.seeds)) + (f" of {row.planned}" if len(row.seeds) < row.planned else "")
        body.append([*cells, Cell(seeds)])
    heads = ["arm", *(title for title, _, _ in columns)]
    notes = [
        f"Per cent correct, the mean over seeds, n = {asked} questions. The 95 % interval is for new seeds and new "
        "questions: questions are redrawn for all seeds at once, seeds enter as in a t interval."
    ]
    if plan.reference is not None:
        label = next((row.label for row in (each.row for each in results) if row.arm == plan.reference), "")
        heads += [f"− {label}", "p (Holm)"]
        notes.append(
            f"The difference to {label} is taken on the same questions, over all of them, and seed by seed (runs of a "
            "seed begin alike); p is from the same draws, adjusted by Holm for the number of rows."
        )
    return Table(plan.title, [*heads, "seeds"], body, notes)


FIGURES = ("mean", "low", "high", "sd", "seeds", "n", "p")


def csv_of(results: Sequence[Result], columns: Sequence[Column]) -> str:
    """One line a figure, in full, as shares and not per cent: arm, latents, column, what, then ``FIGURES``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "latents", "column", "what", *FIGURES])
    for result in results:
        own = [result.row.arm, result.row.mode]
        given = [(title, "accuracy", share) for (title, _, _), share in zip(columns, result.shares)]
        given.append((columns[0][0], "difference", result.difference))
        for title, what, one in given:
            if one is not None:
                figures = vars(one) | {"seeds": "+".join(map(str, one.seeds))}
                writer.writerow([*own, title, what, *(figures[name] for name in FIGURES)])
    return text.getvalue()


def write_table(plan: Plan) -> Path | None:
    """Write OUT/table.md, .html, .csv and .tex; None where nothing has been evaluated yet."""
    rows = rows_of(plan)
    if not any(row.seeds for row in rows):
        return None
    columns = groups(evaluations(rows))
    results = results_of(plan, rows, columns)
    table = table_of(plan, results, columns)
    write_text(plan.out / f"{NAME}.csv", csv_of(results, columns))
    write_text(plan.out / f"{NAME}.md", table.to_markdown())
    write_text(plan.out / f"{NAME}.html", table.to_html())
    write_text(plan.out / f"{NAME}.tex", table.to_latex())
    return plan.out / f"{NAME}.md"
