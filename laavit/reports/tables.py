"""Tables as data, computed from per-sample records; HTML and Markdown come from one table."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laavit.evaluation.statistics import Difference, mcnemar, paired_bootstrap, wilson
from laavit.reports.runs import Evaluation, Record, Run

#: What a cell says where nothing was measured.
EMPTY = "–"


@dataclass(frozen=True)
class Cell:
    """One cell: the figure, its interval or the like in smaller type, and where it comes from (shown on hovering)."""

    text: str
    detail: str = ""
    source: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table and the sentences below it. The first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()

    def to_html(self) -> str:
        """A ``<table>`` in a frame that scrolls sideways where the screen is narrow."""
        head = "".join(f"<th scope='col'>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(f"<tr>{''.join(_cell_html(cell, i) for i, cell in enumerate(row))}</tr>" for row in self.rows)
        notes = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in self.notes)
        return (
            f"<h3>{html.escape(self.title)}</h3><div class='scroll' tabindex='0'><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>{notes}"
        )

    def to_markdown(self) -> str:
        """The same table for a README."""

        def text(cell: Cell) -> str:
            figure = f"**{cell.text}**" if cell.best else cell.text
            return f"{figure} {cell.detail}".strip().replace("|", "\\|")

        lines = [f"### {self.title}", "", _bar(self.columns), _bar(["---"] + ["---:"] * (len(self.columns) - 1))]
        lines += [_bar(text(cell) for cell in row) for row in self.rows]
        lines += [part for note in self.notes for part in ("", note)]
        return "\n".join(lines) + "\n"


def _bar(parts: Iterable[str]) -> str:
    return f"| {' | '.join(parts)} |"


def _cell_html(cell: Cell, column: int) -> str:
    tag = "th scope='row'" if column == 0 else "td"
    title = f" title='{html.escape(cell.source, quote=True)}'" if cell.source else ""
    figure = html.escape(cell.text)
    if cell.best:
        figure = f"<strong>{figure}</strong>"
    detail = f"<small>{html.escape(cell.detail)}</small>" if cell.detail else ""
    return f"<{tag}{title}>{figure}{detail}</{tag.split()[0]}>"


@dataclass(frozen=True)
class Row:
    """One evaluated model: what it is called, and its records."""

    label: str
    run: str
    evaluation: Evaluation

    def share(self, task: str | None = None, kind: str | None = None) -> tuple[int, int]:
        """Correct answers and questions among the records of a task and kind (None: all of them)."""
        found = [
            record.correct
            for record in self.evaluation.records
            if (task is None or record.task == task) and (kind is None or record.kind == kind)
        ]
        return sum(found), len(found)


def result_rows(runs: Sequence[Run]) -> list[Row]:
    """One row for every evaluation of every run; an evaluation's name is said only where rows need it."""
    rows = []
    for run in runs:
        for latents in ("on", "off"):
            same = [evaluation for evaluation in run.evaluations if evaluation.latents == latents]
            for evaluation in same:
                name = run.label + (", latents off" if latents == "off" else "")
                rows.append(Row(name + (f" ({evaluation.name})" if len(same) > 1 else ""), run.label, evaluation))
    return rows


def _ordered(values: Iterable[str | None]) -> list[str]:
    """Distinct names in the order of their first appearance."""
    return list(dict.fromkeys(value for value in values if value is not None))


def groups(rows: Sequence[Row]) -> list[tuple[str, str | None, str | None]]:
    """The columns of the results, as (title, task, kind): all questions, then tasks, then a task's kinds."""
    records: list[Record] = [record for row in rows for record in row.evaluation.records]
    tasks = _ordered(record.task for record in records)
    found: list[tuple[str, str | None, str | None]] = [("all questions", None, None)]
    if len(tasks) > 1:
        found += [(task, task, None) for task in tasks]
    for task in tasks:
        kinds = _ordered(record.kind for record in records if record.task == task)
        if len(kinds) > 1:
            found += [(kind if len(tasks) == 1 else f"{task}: {kind}", task, kind) for kind in kinds]
    return found


def percent(share: float) -> str:
    """A share as per cent with one decimal, without the sign."""
    return f"{100 * share:.1f}"


def results_table(rows: Sequence[Row]) -> Table:
    """Accuracy with its 95 % Wilson interval: one row a model, one column a group of questions."""
    columns = groups(rows)
    counts = [[row.share(task, kind) for _, task, kind in columns] for row in rows]
    best = [
        max((k / n for k, n in column if n), default=float("nan")) if len(rows) > 1 else float("nan")
        for column in zip(*counts, strict=True)
    ]
    body = []
    for row, line in zip(rows, counts, strict=True):
        cells = [Cell(row.label, source=row.evaluation.source)]
        for (k, n), top in zip(line, best, strict=True):
            if not n:
                cells.append(Cell(EMPTY, source="not evaluated"))
                continue
            low, high = wilson(k, n)
            interval = f"[{percent(low)}, {percent(high)}]"
            cells.append(Cell(percent(k / n), interval, f"{k} of {n}: {row.evaluation.source}", k / n == top))
        body.append(cells)
    sizes = [max((line[i][1] for line in counts), default=0) for i in range(len(columns))]
    titles = [f"{title} (n\u00a0=\u00a0{size})" for (title, _, _), size in zip(columns, sizes, strict=True)]
    notes = ["Per cent correct, with the 95 % Wilson interval. Bold: the highest figure of a column."]
    if len(_ordered(record.task for row in rows for record in row.evaluation.records)) > 1:
        notes.append("'All questions' pools the tasks: every question counts once, so large tasks weigh more.")
    for i, (title, _, _) in enumerate(columns):
        fewer = [row.label for row, line in zip(rows, counts, strict=True) if 0 < line[i][1] < sizes[i]]
        if fewer:
            notes.append(f"'{title}' has fewer than {sizes[i]} questions for {', '.join(fewer)}.")
    return Table("Accuracy", ["model", *titles], body, notes)


@dataclass(frozen=True)
class Comparison:
    """Two models on the questions that both answered.

    Args:
        gain: accuracy of ``row`` minus accuracy of ``reference`` as a share, with its 95 % paired bootstrap interval.
        p: McNemar's test. won, lost: questions that only ``row``, or only ``reference``, answered correctly.
    """

    row: Row
    reference: Row
    gain: Difference
    p: float
    won: int
    lost: int


def pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """What is compared: a run with the runs above it (the first two where there are many); latents off with on."""
    on = [row for row in rows if row.evaluation.latents != "off"]
    found = []
    for row in rows:
        if row.evaluation.latents == "off":
            found += [(row, other) for other in on if other.run == row.run]
        else:
            above = on[: on.index(row)]
            found += [(row, other) for other in (above if len(on) <= 4 else above[:2]) if other.run != row.run]
    return found


def compare(row: Row, reference: Row, iterations: int, seed: int) -> Comparison | None:
    """The paired comparison of two rows, or None where they share no question."""
    ours = {record.key: record.correct for record in row.evaluation.records}
    theirs = {record.key: record.correct for record in reference.evaluation.records}
    keys = [key for key in ours if key in theirs]
    if not keys:
        return None
    a, b = [ours[key] for key in keys], [theirs[key] for key in keys]
    won = sum(x and not y for x, y in zip(a, b, strict=True))
    lost = sum(y and not x for x, y in zip(a, b, strict=True))
    return Comparison(
        row, reference, paired_bootstrap(a, b, iterations=iterations, seed=seed), mcnemar(a, b), won, lost
    )


def comparisons(rows: Sequence[Row], iterations: int = 10_000, seed: int = 0) -> list[Comparison]:
    """Every comparison of ``pairs`` that has questions in common."""
    found = [compare(row, reference, iterations, seed) for row, reference in pairs(rows)]
    return [one for one in found if one is not None]


def p_text(p: float) -> str:
    """A p value with its relation, as it stands in a sentence."""
    return "< 0.0001" if p < 1e-4 else f"= {p:.4f}"


def comparisons_table(found: Sequence[Comparison], iterations: int) -> Table:
    """Paired differences: the same questions, answered by two models."""
    body = [
        [
            Cell(f"{one.row.label} − {one.reference.label}"),
            Cell(
                f"{100 * one.gain.mean:+.1f}",
                f"[{100 * one.gain.low:+.1f}, {100 * one.gain.high:+.1f}]",
                f"{one.row.evaluation.source} and {one.reference.evaluation.source}",
            ),
            Cell(p_text(one.p).removeprefix("= ")),
            Cell(str(one.won)),
            Cell(str(one.lost)),
            Cell(str(one.gain.n)),
        ]
        for one in found
    ]
    notes = [
        f"Points of accuracy on the questions that both answered, with a 95 % interval from {iterations} paired "
        "bootstrap draws over the questions; p from the exact McNemar test, not corrected for several comparisons."
    ]
    return Table(
        "Paired differences", ["pair", "points", "p", "only first right", "only second right", "n"], body, notes
    )


def gaze_table(statistics: Mapping[str, Any], source: str) -> Table:
    """Attention statistics as in Table 2 of the paper, with the mass inside the ground-truth boxes (Sec. 3.1)."""

    def spread(name: str, key: str, digits: int) -> Cell:
        found = statistics[name].get(key)
        if found is None:
            return Cell(EMPTY)
        return Cell(f"{found[0]:.{digits}f}", f"± {found[1]:.{digits}f}", source)

    body = []
    for name, found in statistics.items():
        inside = Cell(EMPTY)
        if "in_box" in found:
            mean, low, high = found["in_box"]
            inside = Cell(percent(mean), f"[{percent(low)}, {percent(high)}]", source)
        figures = [spread(name, "entropy", 3), spread(name, "salient", 1), spread(name, "cv", 2)]
        body.append([Cell(name), inside, *figures, Cell(str(found.get("n", EMPTY)), source=source)])
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
    keys = _ordered(key for one in flat for key in one)
    shown = [key for key in keys if len({one.get(key, EMPTY) for one in flat}) > 1]
    if len(known) < 2 or not shown:
        return None
    body = [[Cell(key), *(Cell(one.get(key, EMPTY)) for one in flat)] for key in shown]
    same = f"The other {len(keys) - len(shown)} keys of the recipes are equal."
    return Table("What differs between the recipes", ["key", *(run.label for run in known)], body, [same])
