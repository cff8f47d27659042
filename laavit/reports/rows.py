"""Rows of the results: one model, or several seeds of it, with its records; and what two rows differ by."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laavit.evaluation.statistics import mcnemar, paired_bootstrap, pooled, pooled_difference, wilson
from laavit.reports.runs import Evaluation, Record, Run

#: Bootstrap draws behind every interval.
ITERATIONS = 10_000


@dataclass(frozen=True)
class Unit:
    """One thing that is right or wrong: a question, or a pair of them.

    Args:
        stratum: whose mean it goes into where the figure is a mean of means. cluster: its image, where that is known.
    """

    value: bool
    stratum: Hashable = None
    cluster: Hashable = None


Units = Mapping[Hashable, Unit]


@dataclass(frozen=True)
class Score:
    """A row's figure as a share with its 95 % interval; ``sd`` over seeds, None with one; ``k`` of ``n`` are right."""

    mean: float
    low: float
    high: float
    sd: float | None
    seeds: int
    n: int
    k: int

    def counts(self) -> str:
        """What is behind it, in words."""
        return f"{self.k} of {self.n}" if self.seeds == 1 else f"{self.seeds} seeds, {self.n} questions each"


@dataclass(frozen=True)
class Gain:
    """The difference of two rows on what both answered, as a share.

    Args:
        p: McNemar's test (``exact``), or from the draws where seeds or images make that test wrong.
        won, lost: what only the first, only the second has right; None with several seeds.
        discordance: the share on which the two differ (the mean over pairs of runs).
    """

    mean: float
    low: float
    high: float
    n: int
    p: float
    exact: bool
    won: int | None
    lost: int | None
    discordance: float


def _aligned(seeds: Sequence[Units]) -> tuple[list[Hashable], NDArray[np.bool_]]:
    """What all seeds answered, in the first one's order, and [S, n] right or wrong."""
    keys = [key for key in seeds[0] if all(key in other for other in seeds)] if seeds else []
    return keys, np.array([[one[key].value for key in keys] for one in seeds], dtype=bool)


def _labels(units: Units, keys: Sequence[Hashable], of: Callable[[Unit], Hashable]) -> list[Hashable] | None:
    """The units' strata or clusters; None where one of them has none, or all have the same or another one."""
    found = [of(units[key]) for key in keys]
    return found if None not in found and 1 < len(set(found)) < len(found) else None


def _strata(unit: Unit) -> Hashable:
    return unit.stratum


def _cluster(unit: Unit) -> Hashable:
    return unit.cluster


def score(seeds: Sequence[Units], iterations: int = ITERATIONS, seed: int = 0) -> Score | None:
    """A figure of one model: Wilson's interval; the pooled bootstrap with several seeds, strata or shared images.

    Returns: None where there is nothing that all seeds answered.
    """
    keys, correct = _aligned(seeds)
    if not keys:
        return None
    strata, clusters = _labels(seeds[0], keys, _strata), _labels(seeds[0], keys, _cluster)
    right, count = int(correct.sum()), len(keys)
    if len(seeds) == 1 and strata is None and clusters is None:
        return Score(right / count, *wilson(right, count), None, 1, count, right)
    found = pooled(correct, iterations=iterations, seed=seed, strata=strata, clusters=None if strata else clusters)
    low, high = max(0.0, found.low), min(1.0, found.high)  # the seeds' t knows no ends
    return Score(found.mean, low, high, found.sd, len(seeds), count, right)


def alike(first: Sequence[int | None], second: Sequence[int | None]) -> list[tuple[int, int]]:
    """Places of the runs of one seed, which began alike; none where a run hangs on no seed, or two on the same."""
    known = [set(seeds) - {None} for seeds in (first, second)]
    if [len(one) for one in known] != [len(first), len(second)]:
        return []
    return [(place, second.index(seed)) for place, seed in enumerate(first) if seed in known[1]]


def gain(
    first: Sequence[Units],
    second: Sequence[Units],
    iterations: int = ITERATIONS,
    seed: int = 0,
    seeds: tuple[Sequence[int | None], Sequence[int | None]] = ((), ()),
) -> Gain | None:
    """What the first row has over the second, on what all of their seeds answered; None where that is nothing.

    Args:
        seeds: of the runs of both rows. Where both have runs of one seed, these alone are compared, one by one: what a
            seed does to both cancels.
    """
    pairs = alike(*seeds)
    if pairs:
        first, second = [first[i] for i, _ in pairs], [second[j] for _, j in pairs]
    keys, _ = _aligned([*first, *second])
    if not first or not second or not keys:
        return None
    won: int | None = None  # of several seeds: of which pair?
    lost: int | None = None
    ours, theirs = (np.array([[one[key].value for key in keys] for one in seeds]) for seeds in (first, second))
    apart = float((ours != theirs if pairs else ours[:, None] != theirs[None]).mean())
    strata, clusters = _labels(first[0], keys, _strata), _labels(first[0], keys, _cluster)
    if len(first) == len(second) == 1:
        a, b = ours[0].tolist(), theirs[0].tolist()
        won, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        if strata is None and clusters is None:
            exact = paired_bootstrap(a, b, iterations=iterations, seed=seed)
            return Gain(exact.mean, exact.low, exact.high, len(keys), mcnemar(a, b), True, won, lost, apart)
    options: dict[str, Any] = {"strata": strata, "clusters": None if strata else clusters, "paired": bool(pairs)}
    found = pooled_difference(ours, theirs, iterations=iterations, seed=seed, **options)
    return Gain(found.mean, found.low, found.high, len(keys), found.tested, False, won, lost, apart)


@dataclass(frozen=True)
class Row:
    """One model as it was evaluated: what it is called, and its records, of every seed."""

    label: str
    run: str
    evaluations: tuple[Evaluation, ...]

    @property
    def evaluation(self) -> Evaluation:
        """The first seed's, for what all of them share."""
        return self.evaluations[0]

    @property
    def seeds(self) -> list[int | None]:
        """Each evaluation's."""
        return [one.seed for one in self.evaluations]

    @property
    def source(self) -> str:
        """Where the figures come from: the records of every seed."""
        return "; ".join(f"{one.source} (SHA-256 {one.digest[:12]})" for one in self.evaluations)

    def units(self, task: str | None = None, kind: str | None = None) -> list[Units]:
        """Each seed's answers to the questions of a task and kind (None: all of them)."""
        return [
            {
                record.key: Unit(record.correct)
                for record in one.records
                if (task is None or record.task == task) and (kind is None or record.kind == kind)
            }
            for one in self.evaluations
        ]

    def score(self, task: str | None = None, kind: str | None = None) -> Score | None:
        """Accuracy on the questions of a task and kind; None where none was asked."""
        return score(self.units(task, kind))


def result_rows(runs: Sequence[Run]) -> list[Row]:
    """One row for every way in which a model was evaluated; runs of one label are seeds of one model.

    What changes a model at inference (latents off or of another number, an intervention) is said; an evaluation's name
    only where rows need it.
    """
    rows = []
    for label in ordered(run.label for run in runs):
        seeds = [run for run in runs if run.label == label]
        ways = ordered(one.way for run in seeds for one in run.evaluations)
        for way in sorted(ways, key=lambda way: (way != "", way != ", latents off")):
            names = ordered(one.name for run in seeds for one in run.evaluations if one.way == way)
            for name in names:
                found = [one for run in seeds for one in run.evaluations if (one.way, one.name) == (way, name)]
                rows.append(Row(label + way + (f" ({name})" if len(names) > 1 else ""), label, tuple(found)))
    return rows


def ordered(values: Iterable[str | None]) -> list[str]:
    """Distinct names in the order of their first appearance."""
    return list(dict.fromkeys(value for value in values if value is not None))


def groups(evaluations: Iterable[Evaluation]) -> list[tuple[str, str | None, str | None]]:
    """The columns of results, as (title, task, kind): all questions, then tasks, then a task's kinds."""
    records: list[Record] = [record for one in evaluations for record in one.records]
    tasks = ordered(record.task for record in records)
    found: list[tuple[str, str | None, str | None]] = [("all questions", None, None)]
    if len(tasks) > 1:
        found += [(task, task, None) for task in tasks]
    for task in tasks:
        kinds = ordered(record.kind for record in records if record.task == task)
        if len(kinds) > 1:
            found += [(kind if len(tasks) == 1 else f"{task}: {kind}", task, kind) for kind in kinds]
    return found


def of_all(rows: Iterable[Row]) -> list[Evaluation]:
    """The evaluations behind rows."""
    return [one for row in rows for one in row.evaluations]


@dataclass(frozen=True)
class Comparison:
    """Two rows on the questions that both answered: ``gain`` is accuracy of ``row`` minus that of ``reference``."""

    row: Row
    reference: Row
    gain: Gain


def pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """What is compared: a model with those above it (the first two of many); an altered one with itself."""
    on = [row for row in rows if not row.evaluation.way]
    found = []
    for row in rows:
        if row.evaluation.way:
            found += [(row, other) for other in on if other.run == row.run]
        else:
            above = on[: on.index(row)]
            found += [(row, other) for other in (above if len(on) <= 4 else above[:2]) if other.run != row.run]
    return found


def comparisons(rows: Sequence[Row], iterations: int = ITERATIONS, seed: int = 0) -> list[Comparison]:
    """Every comparison of ``pairs`` that has questions in common."""
    found = [
        (row, other, gain(row.units(), other.units(), iterations, seed, (row.seeds, other.seeds)))
        for row, other in pairs(rows)
    ]
    return [Comparison(row, other, one) for row, other, one in found if one is not None]
