"""Intervals over samples: bootstrap of ratios of sums, permutation within strata, jackknife by blocks.

A sample is what is drawn and left out, never one of its tokens: the tokens of one answer are no independent evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
#: mean, low, high
Interval = list[float]

ITERATIONS = 10_000
#: draws held at a time, so that many samples do not need much memory
CHUNK = 500


def resamples(n: int, iterations: int = ITERATIONS, seed: int = 0) -> Iterator[Floats]:
    """How often each of n samples is in every bootstrap draw: blocks [at most CHUNK, n]."""
    random = np.random.default_rng(seed)
    for start in range(0, iterations, CHUNK):
        yield random.multinomial(n, np.full(n, 1 / n), size=min(CHUNK, iterations - start)).astype(np.float64)


def bootstrap(
    statistic: Callable[[Floats], Floats], n: int, iterations: int = ITERATIONS, seed: int = 0
) -> tuple[Floats, Floats]:
    """A statistic of weights over n samples: its value [C] with every weight 1, and in every draw [iterations, C].

    Args:
        statistic: weights [I, n] -> values [I, C], NaN where a draw leaves it undefined.

    Raises:
        ValueError: there is no sample.
    """
    if n < 1:
        raise ValueError("a bootstrap needs at least one sample")
    draws = [statistic(weights) for weights in resamples(n, iterations, seed)]
    return statistic(np.ones((1, n)))[0], np.concatenate(draws)


def ratio(sums: ArrayLike, counts: ArrayLike) -> Callable[[Floats], Floats]:
    """The statistic sum(w * sums) / sum(w * counts): the mean of values that come in clusters (samples).

    Args:
        sums: of each sample's values [n, C]. counts: how many they are [n, C].
    """
    above, below = (np.asarray(part, dtype=np.float64) for part in (sums, counts))

    def of(weights: Floats) -> Floats:
        return divided(weights @ above, weights @ below)

    return of


def divided(above: Floats, below: Floats) -> Floats:
    """``above / below``, NaN where there is nothing to divide by."""
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below > 0)


def interval(value: float, draws: Floats, level: float = 0.95) -> Interval | None:
    """``[value, low, high]`` by percentiles of the draws [I]; None where the value, or every draw, is undefined."""
    known = draws[~np.isnan(draws)]
    if np.isnan(value) or not len(known):
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return [float(value), float(low), float(high)]


def intervals(
    statistics: Sequence[Callable[[Floats], Floats]], n: int, iterations: int = ITERATIONS, seed: int = 0
) -> list[Interval | None]:
    """Every value of several statistics, one after another, with its interval; all from the same draws."""
    value, draws = bootstrap(
        lambda weights: np.concatenate([each(weights) for each in statistics], 1), n, iterations, seed
    )
    return [interval(value[i], draws[:, i]) for i in range(len(value))]


def means(columns: ArrayLike, iterations: int = ITERATIONS, seed: int = 0) -> list[Interval | None]:
    """The mean of every column [n, C] with its bootstrap interval over the n samples."""
    values = np.asarray(columns, dtype=np.float64)
    return intervals([ratio(values, np.ones_like(values))], len(values), iterations, seed)


def contrast(values: ArrayLike, marked: ArrayLike, strata: ArrayLike | None = None) -> Callable[[Floats], Floats]:
    """The statistic mean(marked) - mean(others), within strata: weights [I, n] -> [I, 1].

    Within strata it is the coefficient of ``marked`` in a regression with an own mean for every stratum:
    ``sum_k w_k (mean_marked,k - mean_others,k) / sum_k w_k``, ``w_k = m_k o_k / (m_k + o_k)`` for m_k marked and o_k
    other samples. A stratum where all are of one kind has no say. One stratum gives the plain difference.

    Args:
        values: [n]. marked: bool [n]. strata: whole numbers [n]; None is one stratum.
    """
    value, mark = np.asarray(values, dtype=np.float64)[:, None], np.asarray(marked, dtype=np.float64)[:, None]
    member = _members(strata, len(value))  # [n, strata]

    def of(weights: Floats) -> Floats:
        count, chosen = weights @ member, weights @ (member * mark)
        total, part = weights @ (member * value), weights @ (member * mark * value)
        above = (part - chosen * divided(total, np.maximum(count, 1e-300))).sum(1)
        below = (chosen * divided(count - chosen, np.maximum(count, 1e-300))).sum(1)
        return divided(above, below)[:, None]

    return of


def _members(strata: ArrayLike | None, n: int) -> Floats:
    """1 where a sample is in a stratum: [n, strata]."""
    if strata is None:
        return np.ones((n, 1))
    _, place = np.unique(np.asarray(strata), return_inverse=True)
    return np.eye(int(place.max()) + 1)[place]


def permutation_p(
    values: ArrayLike, marked: ArrayLike, strata: ArrayLike | None = None, iterations: int = 9_999, seed: int = 0
) -> float | None:
    """The two-sided permutation test of ``contrast``: marks change places within their stratum.

    ``p = (1 + draws at least as far from 0) / (1 + draws)``; None where no stratum has samples of both kinds.

    The contrast is linear in the sum of the marked values' deviations from their stratum's mean, which alone is drawn.
    """
    value, mark = np.asarray(values, dtype=np.float64), np.asarray(marked, dtype=bool)
    member = _members(strata, len(value))
    centred = value - member @ divided(member.T @ value, member.sum(0))
    if not bool(((member.T @ mark > 0) & (member.T @ ~mark > 0)).any()):
        return None
    place = member.argmax(1)
    order = np.argsort(place, kind="stable")
    mark, observed = mark[order], abs(centred[mark].sum())
    random, extreme = np.random.default_rng(seed), 0
    for start in range(0, iterations, CHUNK):
        keys = random.random((min(CHUNK, iterations - start), len(value))) + place
        drawn = centred[np.argsort(keys, axis=1)]  # every stratum's values in a new order, strata in theirs
        # the slack keeps equal sums equal, whatever the order in which they were added up
        extreme += int((np.abs(drawn @ mark) >= observed - 1e-12 * (1 + observed)).sum())
    return (1 + extreme) / (1 + iterations)


def jackknife(
    statistic: Callable[[NDArray[np.int64]], float], clusters: ArrayLike, blocks: int = 20
) -> Interval | None:
    """``[value, value - 1.96 se, value + 1.96 se]``, the standard error by leaving out blocks of clusters in turn.

    For statistics of pairs, which a bootstrap's repeated samples would bias. None where the statistic is undefined.

    Args:
        statistic: of the rows that are kept, long [m]. clusters: the sample of each row, [n].
    """
    cluster = np.asarray(clusters)
    rows, names = np.arange(len(cluster)), np.unique(cluster)
    value = statistic(rows)
    parts = [part for part in np.array_split(names, min(blocks, len(names))) if len(part)]
    without = np.array([statistic(rows[~np.isin(cluster, part)]) for part in parts if len(parts) > 1])
    if np.isnan(value) or not len(without) or np.isnan(without).any():
        return None
    spread = np.sqrt((len(without) - 1) / len(without) * ((without - without.mean()) ** 2).sum())
    return [float(value), float(value - 1.96 * spread), float(value + 1.96 * spread)]
