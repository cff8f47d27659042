"""The tables of the page, computed from per-sample records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laavit.evaluation.statistics import holm
from laavit.reports.rows import Comparison, Row, groups, of_all, ordered
from laavit.reports.runs import Run
from laavit.reports.table import EMPTY, Cell, Table

__all__ = ["EMPTY", "Cell", "Table"]


def percent(share: float) -> str:
    """A share as per cent with one decimal, without the sign."""
    return f"{100 * share:.1f}"


def points(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * share:+.1f}".replace("-0.0", "+0.0")


def between(low: float, high: float, text: Any = percent) -> str:
    """An interval, as it stands beside a figure."""
    return f"[{text(low)}, {text(high)}]"


def p_text(p: float) -> str:
    """A p value with its relation, as it stands in a sentence."""
    return "< 0.0001" if p < 1e-4 else f"= {p:.4f}"


def results_table(rows: Sequence[Row]) -> Table:
    """Accuracy with its 95 % interval: one row a model, one column a group of questions."""
    columns = groups(of_all(rows))
    scores = [[row.score(task, kind) for _, task, kind in columns] for row in rows]
    best = [
        max((one.mean for one in column if one), default=float("nan")) if len(rows) > 1 else float("nan")
        for column in zip(*scores, strict=True)
    ]
    body = []
    for row, line in zip(rows, scores, strict=True):
        cells = [Cell(row.label, source=row.source)]
        for one, top in zip(line, best, strict=True):
            if one is None:
                cells.append(Cell(EMPTY, source="not evaluated"))
                continue
            source = f"{one.counts()}: {row.source}"
            spread = between(one.low, one.high)
            cells.append(Cell(percent(one.mean), spread, source, one.mean == top, one.mean, one.low, one.high))
        body.append(cells)
    sizes = [max((one.n for one in column if one), default=0) for column in zip(*scores, strict=True)]
    titles = [f"{title} (n\u00a0=\u00a0{size})" for (title, _, _), size in zip(columns, sizes, strict=True)]
    seeds = {row.label: len(row.evaluations) for row in rows}
    counts = sorted(set(seeds.values()))
    wilson = "with the 95 % Wilson interval" if counts[0] == 1 else "with the 95 % interval"
    notes = [f"Per cent correct, {wilson}. Bold: the highest figure of a column."]
    if counts[-1] > 1:
        several = ", ".join(f"{label}: {count}" for label, count in seeds.items() if count > 1)
        over = f"over {counts[0]} seeds" if len(counts) == 1 else f"over seeds where there are several ({several})"
        notes.append(
            f"The mean {over}; {'the' if len(counts) == 1 else 'their'} interval is for other questions and other "
            "seeds (questions redrawn for all seeds at once, seeds as in a t interval)."
        )
    if len(ordered(record.task for row in rows for one in row.evaluations for record in one.records)) > 1:
        notes.append("'All questions' pools the tasks: every question counts once, so large tasks weigh more.")
    for i, (title, _, _) in enumerate(columns):
        fewer = [row.label for row, line in zip(rows, scores, strict=True) if (one := line[i]) and one.n < sizes[i]]
        if fewer:
            notes.append(f"'{title}' has fewer than {sizes[i]} questions for {', '.join(fewer)}.")
    return Table("Accuracy", ["model", *titles], body, notes)


def comparisons_table(found: Sequence[Comparison], iterations: int) -> Table:
    """Paired differences: the same questions, answered by two models."""
    adjusted = holm([one.gain.p for one in found])
    body = []
    for one, holms in zip(found, adjusted, strict=True):
        gain, source = one.gain, f"{one.row.source} and {one.reference.source}"
        sides = [Cell(EMPTY if side is None else str(side), source=source) for side in (gain.won, gain.lost)]
        body.append(
            [
                Cell(f"{one.row.label} − {one.reference.label}", source=source),
                Cell(
                    points(gain.mean),
                    between(gain.low, gain.high, points),
                    source,
                    value=gain.mean,
                    low=gain.low,
                    high=gain.high,
                ),
                Cell(p_text(gain.p).removeprefix("= "), source=source, value=gain.p),
                Cell(p_text(holms).removeprefix("= "), source=source, value=holms),
                *sides,
                Cell(str(gain.n), source=source),
            ]
        )
    notes = [
        f"Points of accuracy on the questions that both answered, with a 95 % interval from {iterations} paired "
        f"bootstrap draws over the questions; p from the exact McNemar test. Holm: p adjusted for all {len(found)} "
        "comparisons of this table."
    ]
    if not all(one.gain.exact for one in found):
        notes.append("Where a model has several seeds, these are drawn too, and p comes from the draws.")
    heads = ["pair", "points", "p", "p, Holm", "only first right", "only second right", "n"]
    if all(one.gain.won is None for one in found):  # of several seeds: of which pair of runs?
        heads, body = [*heads[:4], heads[6]], [[*line[:4], line[6]] for line in body]
    return Table("Paired differences", heads, body, notes)


def gaze_table(statistics: Mapping[str, Any], source: str) -> Table:
    """Attention statistics as in Table 2 of the paper, with the mass inside the ground-truth boxes (Sec. 3.1)."""

    def spread(name: str, key: str, digits: int) -> Cell:
        found = statistics[name].get(key)
        if found is None:
            return Cell(EMPTY, source="not measured")
        return Cell(f"{found[0]:.{digits}f}", f"± {found[1]:.{digits}f}", source, value=found[0])

    body = []
    for name, found in statistics.items():
        inside = Cell(EMPTY, source="not measured")
        if "in_box" in found:
            mean, low, high = found["in_box"]
            inside = Cell(percent(mean), between(low, high), source, value=mean, low=low, high=high)
        figures = [spread(name, "entropy", 3), spread(name, "salient", 1), spread(name, "cv", 2)]
        body.append([Cell(name, source=source), inside, *figures, Cell(str(found.get("n", EMPTY)), source=source)])
    notes = [
        "Mass in box: mean share of the attention on image tokens that falls inside the ground-truth boxes, with a 95 "
        "% interval. Entropy in nats; salient regions are patches above 1.5 × the mean; CV is σ/μ; ± is one standard "
        "deviation over the samples."
    ]
    return Table(
        "Attention statistics", ["who", "mass in box, %", "entropy", "salient regions", "CV", "n"], body, notes
    )


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """A nested recipe as dotted keys; lists and scalars are leaves, an empty mapping says nothing."""
    if isinstance(value, Mapping):
        return {key: text for name, part in value.items() for key, text in flatten(part, f"{prefix}{name}.").items()}
    text = value if isinstance(value, str) else EMPTY if value is None else repr(value)
    return {prefix.rstrip("."): text}


def recipe_table(runs: Sequence[Run]) -> Table | None:
    """The keys in which the recipes differ, one column a run; None where no two runs have a recipe, or none differs."""
    known = [run for run in runs if run.recipe]
    flat = [flatten(run.recipe) for run in known]
    keys = ordered(key for one in flat for key in one)
    shown = [key for key in keys if len({one.get(key, EMPTY) for one in flat}) > 1]
    if len(known) < 2 or not shown:
        return None
    sources = [f"{run.path.name}/recipe.json (SHA-256 {run.recipe_hash[:12]})" for run in known]
    body = [
        [
            Cell(key, source="the runs' recipes"),
            *(Cell(one.get(key, EMPTY), source=source) for one, source in zip(flat, sources)),
        ]
        for key in shown
    ]
    same = f"The other {len(keys) - len(shown)} keys of the recipes are equal."
    return Table("What differs between the recipes", ["key", *(run.label for run in known)], body, [same])
