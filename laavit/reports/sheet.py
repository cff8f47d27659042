"""A published table filled with runs: ours beside the printed figures, with intervals, and what was not run said so."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laavit.evaluation.power import detectable_gain
from laavit.evaluation.statistics import benjamini_hochberg, holm
from laavit.registry import UserError
from laavit.reports.matching import match
from laavit.reports.rows import ITERATIONS, Gain, Score, Unit, Units, gain, score
from laavit.reports.runs import Evaluation, Record, Run
from laavit.reports.spec import Column, Line, Sheet, countable
from laavit.reports.table import EMPTY, Cell, Table
from laavit.reports.tables import between, percent, points

NOT_RUN = "not run"
PAPER, OURS, DIFFERENCE = "paper", "ours", "ours − paper"


@dataclass(frozen=True)
class Result:
    """One measured cell: its figure, what it is made of (a mapping a seed), and the records it comes from."""

    score: Score
    units: tuple[Units, ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def source(self) -> str:
        records = "; ".join(f"{one.source} (SHA-256 {one.digest[:12]})" for one in self.evaluations)
        return f"{self.score.counts()}, protocol {'/'.join(self.protocols)}: {records}"

    @property
    def protocols(self) -> list[str]:
        return sorted({one.protocol for one in self.evaluations})


Results = Mapping[tuple[str, str], Result]


def fill(sheet: Sheet, words: Sequence[Path | str], protocol: str | None = None) -> Results:
    """The measured cells of a table, by (row, column).

    Args:
        words: runs, sweeps and ROW=RUN,RUN (``laavit.reports.matching.match``).
        protocol: only evaluations made under it; None takes all.

    Raises:
        UserError: a run fits no row, a cell has two evaluations, or seeds share no question.
    """
    return fill_runs(sheet, match(sheet, words), protocol)


def fill_runs(sheet: Sheet, runs: Mapping[str, Sequence[Run]], protocol: str | None = None) -> Results:
    """``fill`` with the runs of each row already read."""
    found = {}
    for line in sheet.rows:
        for column in sheet.columns:
            result = _result(line, column, runs.get(line.name, ()), protocol)
            if result is not None:
                found[line.name, column.name] = result
    return found


def _result(line: Line, column: Column, runs: Sequence[Run], protocol: str | None) -> Result | None:
    chosen = [one for run in runs if (one := _evaluation(line, column, run, protocol)) is not None]
    if not chosen:
        return None
    seeds = tuple(units(column, one.records) for one in chosen)
    found = score(seeds)
    if found is None:
        raise UserError(f"row '{line.name}', column '{column.name}': the runs share no question; give each its own row")
    return Result(found, seeds, tuple(chosen))


def _evaluation(line: Line, column: Column, run: Run, protocol: str | None) -> Evaluation | None:
    """The one evaluation of a run that answers a cell.

    Raises:
        UserError: several do.
    """
    found = [
        one
        for one in run.evaluations
        if one.latents == line.latents and not one.intervention and protocol in (None, one.protocol)
        and units(column, one.records)
    ]  # fmt: skip
    if len(found) > 1:
        names = " and ".join(f"{one.name} ({one.protocol})" for one in found)
        raise UserError(
            f"'{run.path}' was evaluated twice on '{column.task}' with latents {line.latents}: {names}; choose with "
            "--protocol, or move one out of the run's eval folder"
        )
    return found[0] if found else None


def units(column: Column, records: Sequence[Record]) -> dict[Hashable, Unit]:
    """What a column's figure counts: questions, or groups of them that have to be all right."""
    for task, kind in column.places:
        own = [record for record in records if record.task == task and kind in (None, record.kind)]
        if own:
            break
    else:
        return {}
    figure = column.figure
    if "all" in figure:
        members: dict[str, list[bool]] = {}
        for record in own:
            if figure["all"] in record.groups:
                members.setdefault(record.groups[figure["all"]], []).append(record.correct)
        return {key: Unit(all(part)) for key, part in members.items() if len(part) >= figure.get("size", 1)}
    group = figure["mean"][0] if "mean" in figure else None
    if group is not None and group != "task":
        own = [record for record in own if group in record.groups]
    return {
        record.id: Unit(record.correct, record.groups.get(group) if group else None, _image(column, record.id))
        for record in own
    }


def _image(column: Column, identity: str) -> str | None:
    found = re.search(column.image, identity) if column.image else None
    return found[1] if found else None


def sheet_tables(sheet: Sheet, results: Results, power: bool = False) -> list[Table]:
    """The table itself, the differences to its reference rows, and with ``power`` what its questions can show."""
    tables = [main_table(sheet, results)]
    tables += [table for name in sheet.reference if (table := gain_table(sheet, sheet.line(name), results))]
    return tables + ([power_table(sheet, results)] if power else [])


def main_table(sheet: Sheet, results: Results) -> Table:
    """Each row as printed, as measured, and the difference; what was not run is marked."""
    printed = any(line.paper for line in sheet.rows)
    body = []
    for line in sheet.rows:
        ours = {column.name: results.get((line.name, column.name)) for column in sheet.columns}
        ran = any(ours.values())
        if line.paper:
            said = PAPER if ran else f"{PAPER}; {NOT_RUN} here"
            body.append([*_heads(sheet, line, said), *(_printed(sheet, line, column) for column in sheet.columns)])
        if ran:
            head = _heads(sheet, line, OURS if printed else "")
            body.append([*head, *(_measured(ours[column.name], column) for column in sheet.columns)])
        if ran and line.paper:
            head = _heads(sheet, line, DIFFERENCE)
            body.append([*head, *(_apart(sheet, line, column, ours[column.name]) for column in sheet.columns)])
    with_params = any(line.params for line in sheet.rows)
    heads = ["model", *(["params"] if with_params else []), *(["whose"] if printed else [])]
    columns = [f"{c.name} (n\u00a0=\u00a0{n})" if (n := _questions(c, results)) else c.name for c in sheet.columns]
    return Table(sheet.title, [*heads, *columns], body, _notes(sheet, results), len(heads), sheet.name)


def _heads(sheet: Sheet, line: Line, whose: str) -> list[Cell]:
    """The words that a table row begins with: the model, its size, and whose figures these are."""
    source = line.source or sheet.source or "the runs named in the row"
    words = [line.label]
    words += [line.params or EMPTY] if any(one.params for one in sheet.rows) else []
    words += [whose] if any(one.paper for one in sheet.rows) else []
    return [Cell(word, source=source) for word in words]


def _questions(column: Column, results: Results) -> int | None:
    return column.n or max((one.score.n for (_, name), one in results.items() if name == column.name), default=None)


def _printed(sheet: Sheet, line: Line, column: Column) -> Cell:
    source = line.source or sheet.source
    figure = line.paper.get(column.name)
    if figure is None:
        return Cell(EMPTY, source=f"{source}: nothing printed")
    odd = column.n is not None and not countable(figure, column.n)
    marks = ("*" if column.name in line.marks else "") + ("†" if odd else "")
    return Cell(figure + marks, source=source, value=float(figure) / 100)


def _measured(result: Result | None, column: Column) -> Cell:
    if result is None:
        return Cell(NOT_RUN, source=NOT_RUN)
    one = result.score
    detail = between(one.low, one.high)
    if one.sd is not None:
        detail += f"\nsd {percent(one.sd)}, {one.seeds} seeds"
    if column.n is not None and one.n < column.n and column.score == "micro":
        detail += f"\n{one.n} of {column.n} questions"
    return Cell(percent(one.mean), detail, result.source, value=one.mean, low=one.low, high=one.high)


def _apart(sheet: Sheet, line: Line, column: Column, result: Result | None) -> Cell:
    figure = line.paper.get(column.name)
    if result is None or figure is None:
        return Cell(EMPTY, source=NOT_RUN if result is None else f"{line.source or sheet.source}: nothing printed")
    one, there = result.score, float(figure) / 100
    low, high = one.low - there, one.high - there
    source = f"{line.source or sheet.source}; {result.source}"
    return Cell(
        points(one.mean - there), between(low, high, points), source, value=one.mean - there, low=low, high=high
    )


def _notes(sheet: Sheet, results: Results) -> list[str]:
    notes = []
    idle = [line.label for line in sheet.rows if not line.paper and not any(name == line.name for name, _ in results)]
    if idle:
        notes.append(f"Not run: {', '.join(idle)}.")
    if results:
        protocols = sorted({name for one in results.values() for name in one.protocols})
        notes.append(
            f"Ours: per cent correct under the protocol {' and '.join(protocols)} (eval/README.md), with a 95 % "
            "interval: Wilson's for one run; with several seeds it is for other questions and other seeds."
        )
        grouped = [column.name for column in sheet.columns if column.image]
        if grouped:
            notes.append(
                f"Several questions are about one image ({', '.join(grouped)}): whole images are redrawn there."
            )
    if any(line.paper for line in sheet.rows):
        notes.append(
            f"Paper: {sheet.source}, as printed. It gives no intervals: those of the differences are ours alone."
        )
    for line in sheet.rows:
        notes += [f"* {line.label}, {name}: {mark}." for name, mark in line.marks.items()]
    odd = [
        f"{line.label}, {column.name} {line.paper[column.name]} (n = {column.n})"
        for line in sheet.rows
        for column in sheet.columns
        if column.n and column.name in line.paper and not countable(line.paper[column.name], column.n)
    ]
    if odd:
        notes.append(f"† No whole number of right answers gives this figure at these n: {'; '.join(odd)}.")
    reasons = [
        f"{c.name}: {c.task}{f' / {c.kind}' if c.kind else ''}, {c.score}; {c.reason}"
        for c in sheet.columns
        if c.reason
    ]
    if reasons:
        notes.append(f"Which questions and which score: {'. '.join(reasons)}.")
    return notes + list(sheet.notes)


def gain_table(sheet: Sheet, reference: Line, results: Results) -> Table | None:
    """What each measured row has over a reference row on the questions that both answered; None where none has any."""
    gains: dict[tuple[str, str], Gain] = {}
    for line in sheet.rows:
        for column in sheet.columns:
            ours, theirs = results.get((line.name, column.name)), results.get((reference.name, column.name))
            if line is reference or ours is None or theirs is None:
                continue
            if (found := _gain(ours, theirs)) is not None:
                gains[line.name, column.name] = found
    if not gains:
        return None
    adjusted = _adjusted(gains)
    body = []
    for line in sheet.rows:
        if any(name == line.name for name, _ in gains):
            cells = [_gained(line, reference, column, gains, adjusted, results) for column in sheet.columns]
            source = f"{line.source or sheet.source or 'the runs named in the row'}"
            body.append([Cell(line.label, source=source), *cells])
    exact = sum(one.exact for one in gains.values())
    tests = {0: "the draws", len(gains): "McNemar's exact test"}.get(
        exact, "McNemar's exact test, or the draws with several seeds or images"
    )
    notes = [
        f"Points on the questions that both answered, with a 95 % paired interval; p from {tests}. {len(gains)} "
        "comparisons are made in this table: Holm keeps the chance of even one false find among them at 5 %, BH "
        "(Benjamini-Hochberg) the share of false finds. Runs of one seed are compared with each other."
    ]
    seeds = {len(one.evaluations) for one in results.values()}
    if 1 in seeds and len(seeds) > 1:
        notes.append("A row of one run knows nothing of its own luck in training, and its intervals leave that out.")
    title = f"{sheet.title}: differences to {reference.label}"
    return Table(
        title, ["model", *(c.name for c in sheet.columns)], body, notes, name=f"{sheet.name}, − {reference.name}"
    )


def _gain(ours: Result, theirs: Result, iterations: int = ITERATIONS) -> Gain | None:
    """Of two rows in a column; runs of one seed are compared with each other."""
    seeds = [one.seed for one in ours.evaluations], [one.seed for one in theirs.evaluations]
    return gain(ours.units, theirs.units, iterations, seeds=seeds)


def _adjusted(gains: Mapping[tuple[str, str], Gain]) -> dict[tuple[str, str], tuple[float, float]]:
    """Holm's and Benjamini-Hochberg's p over all cells of a table."""
    ps = [one.p for one in gains.values()]
    return dict(zip(gains, zip(holm(ps), benjamini_hochberg(ps))))


def _gained(
    line: Line,
    reference: Line,
    column: Column,
    gains: Mapping[Any, Gain],
    adjusted: Mapping[Any, Any],
    results: Results,
) -> Cell:
    key = (line.name, column.name)
    if key not in gains:
        return Cell(EMPTY, source=NOT_RUN)
    one, (holms, bh) = gains[key], adjusted[key]
    detail = f"{between(one.low, one.high, points)}\np {_p(one.p)}\nHolm {_p(holms)}\nBH {_p(bh)}"
    if column.name in line.paper and column.name in reference.paper:
        detail += f"\npaper {float(line.paper[column.name]) - float(reference.paper[column.name]):+.2f}"
    source = f"{results[key].source} and {results[reference.name, column.name].source}"
    return Cell(points(one.mean), detail, source, value=one.mean, low=one.low, high=one.high)


def _p(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def power_table(sheet: Sheet, results: Results) -> Table:
    """The smallest gain that each column's questions show with 80 % power, over the reference row (or 60 %)."""
    body = []
    for column in sheet.columns:
        n = _questions(column, results)
        if n is None:
            continue
        base, source = _baseline(sheet, column, results)
        seen = _discordance(sheet, column, results)
        words = [Cell(word, source=source) for word in (column.name, str(n), percent(base))]
        shown = [_shown(detectable_gain(n, base), source)]
        if seen is None:
            shown.append(Cell(EMPTY, source="no two rows were run"))
        else:
            shown.append(_shown(detectable_gain(n, base, seen), source, f"{percent(seen)} % discordant"))
        body.append([*words, *shown])
    heads = ["column", "questions", "baseline, %", "gain shown, answers independent", "gain shown, discordance as seen"]
    notes = [
        "The smallest gain (points) that a two-sided paired McNemar test at 5 % finds with 80 % power (Connor 1987). "
        "Independent answers are the pessimist's bound; as seen: the mean share of questions on which a row and its "
        "reference differ here. A smaller difference than this is not shown to be none: these questions cannot tell.",
    ]
    return Table("What these questions can show", heads, body, notes, name=f"{sheet.name}, power")


def _shown(found: float | None, source: str, detail: str = "") -> Cell:
    if found is None:
        return Cell(EMPTY, detail, f"no gain is large enough; baseline: {source}")
    return Cell(f"{100 * found:.1f}", detail, f"computed; baseline: {source}", value=found)


def _baseline(sheet: Sheet, column: Column, results: Results) -> tuple[float, str]:
    """The reference row's share, measured or printed; 60 % where it has neither."""
    for name in sheet.reference:
        if (found := results.get((name, column.name))) is not None:
            return found.score.mean, found.source
        if (printed := sheet.line(name).paper.get(column.name)) is not None:
            return float(printed) / 100, sheet.line(name).source or sheet.source
    return 0.6, "assumed"


def _discordance(sheet: Sheet, column: Column, results: Results) -> float | None:
    found = [
        one.discordance
        for name in sheet.reference[:1]
        for line in sheet.rows
        if line.name != name and (line.name, column.name) in results and (name, column.name) in results
        and (one := _gain(results[line.name, column.name], results[name, column.name], iterations=10))
    ]  # fmt: skip
    return sum(found) / len(found) if found else None
