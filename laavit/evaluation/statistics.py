"""Intervals and paired tests for right/wrong answers, computed from per-sample records.

The published test sets have 115-300 questions, so one standard error is 2.7-4.3 points: a figure without an interval,
or two figures compared without pairing their samples, says little.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: numbers held at once while resampling
_CHUNK = 4_000_000


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"a confidence level lies strictly between 0 and 1, got {level}")


def wilson(successes: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927, without continuity correction).

    With p = k/n and z the two-sided normal quantile, the ends are
    ``(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)``: never outside [0, 1], and never of zero width.

    Args:
        successes: k, the number of right answers. total: n, the number of questions.
        level: the confidence level, 0.95 by default.

    Returns:
        (low, high); (0, 1) where nothing was asked.

    Raises:
        ValueError: k is not in 0..n, or the level is not in (0, 1).
    """
    _check_level(level)
    if total < 0 or not 0 <= successes <= total:
        raise ValueError(f"a proportion needs 0 <= successes <= total, got {successes} of {total}")
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / total
    centre = share + z * z / (2 * total)
    half = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


@dataclass(frozen=True)
class Difference:
    """``mean``: accuracy(first) - accuracy(second); (low, high): its bootstrap interval; ``n``: the pairs."""

    mean: float
    low: float
    high: float
    n: int


def _paired(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, int]:
    """(only the first is right, only the second is right, pairs)."""
    if len(first) != len(second):
        raise ValueError(f"paired answers need equal lengths, got {len(first)} and {len(second)}")
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    return int((one & ~two).sum()), int((two & ~one).sum()), len(one)


def paired_bootstrap(
    first: Sequence[bool], second: Sequence[bool], level: float = 0.95, iterations: int = 10_000, seed: int = 0
) -> Difference:
    """Percentile bootstrap of the difference of two accuracies on the *same* questions.

    A pair's difference is -1, 0 or 1, so resampling n pairs with replacement is one multinomial draw over the three
    counts: exact, and O(iterations) instead of O(iterations · n).

    Args:
        first, second: right or wrong, question by question, in the same order.
        level: the interval's level. iterations: bootstrap draws. seed: of numpy's default generator.

    Raises:
        ValueError: lengths differ, there are no pairs, or the level is not in (0, 1).
    """
    _check_level(level)
    wins, losses, total = _paired(first, second)
    if total == 0:
        raise ValueError("a paired difference needs at least one pair of answers")
    shares = np.array([wins, losses, total - wins - losses]) / total
    draws = np.random.default_rng(seed).multinomial(total, shares, size=iterations)
    differences = (draws[:, 0] - draws[:, 1]) / total
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return Difference((wins - losses) / total, float(low), float(high), total)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The exact two-sided McNemar test: p of a split of the discordant pairs at least this uneven under p = 1/2.

    With b and c the discordant counts, ``p = min(1, 2 Σ_{i ≤ min(b, c)} C(b + c, i) / 2^(b + c))``; 1 where the two
    never disagree.

    Raises:
        ValueError: the lengths differ.
    """
    wins, losses, _ = _paired(first, second)
    discordant = wins + losses
    tail = sum(comb(discordant, i) for i in range(min(wins, losses) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**discordant)))


@dataclass(frozen=True)
class Pooled:
    """What several seeds of one arm say together, or the difference of two arms.

    Args:
        mean: over seeds, each with the same weight. low, high: the interval for new seeds and new questions.
        sd: the standard deviation over seeds (n - 1); None with one seed, and for a difference of unpaired runs.
        seeds: how many runs; of a difference those of both arms. n: questions that all of them answered.
        p: of a difference, two-sided, from the same draws; None otherwise.
    """

    mean: float
    low: float
    high: float
    sd: float | None
    seeds: tuple[int, ...]
    n: int
    p: float | None = None

    @property
    def tested(self) -> float:
        """p, of a difference.

        Raises:
            ValueError: it is none.
        """
        if self.p is None:
            raise ValueError("only a difference has a p value")
        return self.p


def pooled(
    correct: NDArray[Any],
    level: float = 0.95,
    iterations: int = 10_000,
    seed: int = 0,
    strata: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
) -> Pooled:
    """Accuracy over seeds and questions, both of them random: questions are redrawn, seeds enter as in a t interval.

    Every draw takes n of the n questions for all seeds at once: a question that is hard for one seed is hard for the
    others, so S · n answers are far from S · n independent ones. A handful of seeds cannot be redrawn (three of them
    know three values), so a draw moves their mean by s / √S times a draw of Student's t with S - 1 degrees, s being the
    standard deviation over seeds. What a seed and a question have to do with each other alone is counted twice (in s
    and in the questions drawn): the interval is a little wide, never narrow. With one seed this is the plain bootstrap
    over questions, and the interval says nothing of training again.

    Args:
        correct: [S, n], seeds by questions; right or wrong, or any score.
        strata: of each question; the result is the mean of the strata's means (macro), each redrawn in itself.
        clusters: of each question; questions about one image are not independent, so whole images are drawn.
        level, iterations, seed: as for ``paired_bootstrap``.

    Raises:
        ValueError: nothing was answered, the level is not in (0, 1), or strata and clusters are both given.
    """
    values = _matrix(correct)
    means = _means(values, strata)
    rng = np.random.default_rng(seed)
    draws = _redrawn(values.mean(axis=0), iterations, rng, strata, clusters) + _seeds(means, iterations, rng)
    low, high = _ends(draws, level)
    sd = float(means.std(ddof=1)) if len(means) > 1 else None
    return Pooled(float(means.mean()), low, high, sd, (len(values),), values.shape[1])


def pooled_difference(
    first: NDArray[Any],
    second: NDArray[Any],
    level: float = 0.95,
    iterations: int = 10_000,
    seed: int = 0,
    strata: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
    paired: bool = False,
) -> Pooled:
    """The difference of two arms: the same questions are drawn for both, seeds are within each arm.

    p is the two-sided bootstrap p: twice the smaller share of draws on one side of zero (at least 1 / iterations). It
    stands in for McNemar's test where an arm has several seeds or images have several questions, which that test does
    not know.

    Args:
        first: [S1, n]. second: [S2, n], the same questions in the same order. The others: as for ``pooled``.
        paired: run i of both began alike (seed: initialisation and order of the data), so that what a seed does to both
            cancels: the spread that counts is that of the runs' differences.

    Raises:
        ValueError: as ``pooled``, or the arms have different numbers of questions, or of runs that are paired.
    """
    one, two = _matrix(first), _matrix(second)
    if one.shape[1] != two.shape[1]:
        raise ValueError(f"paired answers need equal lengths, got {one.shape[1]} and {two.shape[1]}")
    if paired and len(one) != len(two):
        raise ValueError(f"paired runs need equal numbers, got {len(one)} and {len(two)}")
    ours, theirs = _means(one, strata), _means(two, strata)
    rng = np.random.default_rng(seed)
    draws = _redrawn(one.mean(axis=0) - two.mean(axis=0), iterations, rng, strata, clusters)
    sd = None
    if paired:
        draws += _seeds(ours - theirs, iterations, rng)
        sd = float((ours - theirs).std(ddof=1)) if len(one) > 1 else None
    else:
        draws += _seeds(ours, iterations, rng) - _seeds(theirs, iterations, rng)
    low, high = _ends(draws, level)
    mean = float(ours.mean() - theirs.mean())
    return Pooled(mean, low, high, sd, (len(one), len(two)), one.shape[1], _two_sided(draws))


def bootstrap(
    values: NDArray[Any],
    statistic: Callable[..., NDArray[Any]] = np.mean,
    level: float = 0.95,
    iterations: int = 10_000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float, float, float]:
    """Percentile bootstrap of any statistic over samples.

    Args:
        values: [n] or [n, ...], one entry a sample.
        statistic: takes an array and ``axis=``, as numpy's own do, and reduces the samples' axis to one number.
        clusters: of each sample; whole clusters are drawn (their samples may differ in number).
        level, iterations, seed: as for ``paired_bootstrap``.

    Returns:
        (statistic, low, high).

    Raises:
        ValueError: there are no samples, or the level is not in (0, 1).
    """
    values = np.asarray(values)
    if not len(values):
        raise ValueError("a bootstrap needs at least one sample")
    rng = np.random.default_rng(seed)
    if clusters is not None:
        members = _members(clusters, len(values))
        found = [
            float(statistic(values[np.concatenate([members[i] for i in picked])], axis=0))
            for picked in rng.integers(len(members), size=(iterations, len(members)))
        ]
    else:
        batch = max(1, _CHUNK // values.size)  # so that memory stays bounded however many samples there are
        found = []
        for start in range(0, iterations, batch):
            picked = rng.integers(len(values), size=(min(batch, iterations - start), len(values)))
            found += np.asarray(statistic(values[picked], axis=1), dtype=np.float64).tolist()
    low, high = _ends(np.asarray(found), level)
    return float(statistic(values, axis=0)), low, high


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p values: one below α is an error with probability α at most, however they depend.

    The i-th smallest of m becomes max_{j ≤ i} min(1, (m - j + 1) p_j).
    """
    adjusted, largest = [0.0] * len(ps), 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        adjusted[index] = largest
    return adjusted


def benjamini_hochberg(ps: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's (1995) adjusted p values: among those below q, a share q is false at most, on average.

    The i-th smallest of m becomes min_{j ≥ i} min(1, m p_j / j); for independent or positively dependent tests.
    """
    adjusted, smallest = [0.0] * len(ps), 1.0
    for place, index in reversed(list(enumerate(sorted(range(len(ps)), key=lambda i: ps[i]), 1))):
        smallest = min(smallest, len(ps) * ps[index] / place)
        adjusted[index] = smallest
    return adjusted


def _matrix(correct: NDArray[Any]) -> NDArray[np.float64]:
    values = np.atleast_2d(np.asarray(correct, dtype=np.float64))
    if values.ndim != 2 or not values.size:
        raise ValueError(f"answers are [seeds, questions] and not empty, got the shape {values.shape}")
    return values


def _redrawn(
    values: NDArray[np.float64],
    iterations: int,
    rng: np.random.Generator,
    strata: Sequence[Hashable] | None,
    clusters: Sequence[Hashable] | None,
) -> NDArray[np.float64]:
    """The mean of [n] values over redrawn questions, [iterations]; of strata the mean of their means.

    Questions with one value are one pattern, and resampling n questions is one multinomial draw over the patterns'
    counts: exact, and O(iterations · patterns) instead of O(iterations · n). A cluster's pattern is its sum and size.
    """
    if strata is not None and clusters is not None:
        raise ValueError("strata and clusters cannot both be given: a cluster may lie in several strata")
    if clusters is not None:
        members = _members(clusters, len(values))
        units = [np.array([[values[one].sum(), len(one)] for one in members])]
    else:
        groups = [np.arange(len(values))] if strata is None else _members(strata, len(values))
        units = [np.column_stack([values[one], np.ones(len(one))]) for one in groups]
    means = np.zeros(iterations)
    for group in units:
        # sums of shares differ in their last bits
        patterns, counts = np.unique(group.round(12), axis=0, return_counts=True)
        batch = max(1, _CHUNK // len(patterns))
        for start in range(0, iterations, batch):
            rows = slice(start, min(start + batch, iterations))
            drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size=rows.stop - start) @ patterns
            means[rows] += drawn[:, 0] / drawn[:, 1]
    return means / len(units)


def _means(values: NDArray[np.float64], strata: Sequence[Hashable] | None) -> NDArray[np.float64]:
    """[S, n] -> each seed's mean, of strata the mean of their means: [S]"""
    groups = [np.arange(values.shape[1])] if strata is None else _members(strata, values.shape[1])
    return np.mean([values[:, one].mean(axis=1) for one in groups], axis=0)


def _seeds(means: NDArray[np.float64], iterations: int, rng: np.random.Generator) -> NDArray[np.float64] | float:
    """What the seeds leave open of their mean, [iterations]: s / √S times Student's t; nothing with one seed."""
    if len(means) == 1:
        return 0.0
    return means.std(ddof=1) / sqrt(len(means)) * rng.standard_t(len(means) - 1, iterations)


def _members(labels: Sequence[Hashable], total: int) -> list[NDArray[np.int64]]:
    """The places of each label, labels in the order of their first appearance."""
    if len(labels) != total:
        raise ValueError(f"each question needs a label, got {len(labels)} for {total}")
    places: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        places.setdefault(label, []).append(i)
    return [np.asarray(one, dtype=np.int64) for one in places.values()]


def _ends(draws: NDArray[np.float64], level: float) -> tuple[float, float]:
    _check_level(level)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _two_sided(draws: NDArray[np.float64]) -> float:
    """Twice the smaller share of draws on one side of zero; a draw of exactly zero counts on both."""
    share = min((draws <= 0).mean(), (draws >= 0).mean())
    return float(min(1.0, 2 * max(share, 1 / (len(draws) + 1))))
