"""How many questions a claimed gain needs, and what gain a number of questions can show.

Two models answer the same questions, and McNemar's test decides on those that exactly one of them answers correctly.
With p10 and p01 the shares of questions that only the better, only the worse model answers, the gain is
``d = p10 - p01`` and the discordance ``ψ = p10 + p01``. Models that agree on much (small ψ) need few questions.
"""

from __future__ import annotations

from math import ceil, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from laavit.registry import UserError


def independent_discordance(baseline: float, gain: float) -> float:
    """ψ of two models whose answers have nothing to do with one another: p1 (1 - p0) + p0 (1 - p1), p1 = p0 + d.

    Models of one family agree more than that, so it is the pessimist's bound where the discordance is not known.
    """
    better = baseline + gain
    return better * (1 - baseline) + baseline * (1 - better)


def questions_needed(gain: float, discordance: float, power: float = 0.8, level: float = 0.95) -> int:
    """The number of paired questions that shows a gain with the given power (Connor 1987).

    ``n = (z_{1-α/2} √ψ + z_{power} √(ψ - d²))² / d²``, for the two-sided McNemar test. The exact test, which is more
    careful than its normal approximation, needs a few per cent more (``mcnemar_power``).

    Args:
        gain: d, as a share; its sign does not matter. discordance: ψ, as a share.
        power: the chance to find the gain. level: 1 - α.

    Raises:
        UserError: a figure is outside its range, or ψ is smaller than the gain, which cannot be.
    """
    _check(gain, discordance, power, level)
    sides = _z((1 + level) / 2) * sqrt(discordance) + _z(power) * sqrt(discordance - gain * gain)
    return ceil(sides * sides / (gain * gain))


def detectable_gain(
    n: int, baseline: float, discordance: float | None = None, power: float = 0.8, level: float = 0.95
) -> float | None:
    """The smallest gain that n questions show with the given power: ``questions_needed`` turned round, by bisection.

    Args:
        baseline: the worse model's accuracy as a share. discordance: ψ; None takes the independence bound.

    Returns:
        The gain as a share; None where even the largest possible one needs more questions.

    Raises:
        UserError: n < 1, or a figure is outside its range.
    """
    if n < 1:
        raise UserError(f"n = {n} was given; allowed: whole numbers from 1")
    _share("baseline", baseline)
    most = min(1 - baseline, 1.0 if discordance is None else discordance)

    def enough(gain: float) -> bool:
        assumed = independent_discordance(baseline, gain) if discordance is None else discordance
        return questions_needed(gain, assumed, power, level) <= n

    if most <= 0 or not enough(most):
        return None
    low, high = 0.0, most
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def mcnemar_power(n: int, gain: float, discordance: float, level: float = 0.95) -> float:
    """The exact power of the exact two-sided McNemar test at n questions.

    The number of discordant pairs is Binomial(n, ψ), and of m of them the better model has Binomial(m, p10 / ψ): the
    sum over both of what the test rejects.
    """
    from scipy.stats import binom

    _check(gain, discordance, 0.5, level)
    sizes = np.arange(n + 1)
    weight = binom.pmf(sizes, n, discordance)
    share = (discordance + abs(gain)) / (2 * discordance)
    # the largest k with 2 P(X <= k) <= α under p = 1/2; -1 where no outcome is rejected
    largest = binom.ppf((1 - level) / 2, sizes, 0.5)
    largest = np.where(2 * binom.cdf(largest, sizes, 0.5) <= (1 - level) * (1 + 1e-9), largest, largest - 1)
    rejected: NDArray[np.float64] = binom.cdf(largest, sizes, share) + binom.sf(sizes - largest - 1, sizes, share)
    return float((weight * np.where(largest < 0, 0.0, rejected)).sum())


def _z(share: float) -> float:
    return NormalDist().inv_cdf(share)


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} = {value:g} was given; allowed: a share from 0 to 1")


def _check(gain: float, discordance: float, power: float, level: float) -> None:
    for name, value in (("power", power), ("level", level)):
        if not 0 < value < 1:
            raise UserError(f"{name} = {value:g} was given; allowed: a share between 0 and 1")
    _share("discordance", discordance)
    if not 0 < abs(gain) <= 1:
        raise UserError(f"gain = {gain:g} was given; allowed: a share that is not 0, at most 1")
    if discordance < abs(gain):
        raise UserError(
            f"discordance = {discordance:g} was given for a gain of {abs(gain):g}; allowed: at least the gain, since "
            "every question gained is answered by exactly one of the two"
        )
