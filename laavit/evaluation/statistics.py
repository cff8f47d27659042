"""Intervals and paired tests for right/wrong answers, computed from per-sample records.

The published test sets have 115-300 questions, so one standard error is 2.7-4.3 points: a figure without an interval,
or two figures compared without pairing their samples, says little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb, sqrt
from statistics import NormalDist

import numpy as np


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
