"""Intervals and tests against closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from laavit.evaluation.statistics import mcnemar, paired_bootstrap, wilson


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (202, 300), (1, 115), (62, 124), (3000, 6000)])
def test_wilson_is_scipys(k: int, n: int, level: float) -> None:
    expected = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert wilson(k, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_solves_its_own_equation() -> None:
    """The ends are the two p with |k/n - p| = z sqrt(p (1 - p) / n)."""
    z = stats.norm.ppf(0.975)
    for end in wilson(43, 134):
        assert abs(43 / 134 - end) == pytest.approx(z * np.sqrt(end * (1 - end) / 134), rel=1e-12)


def test_wilson_of_nothing_and_of_nonsense() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    for k, n, level in ((3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0), (1, 2, 0.0)):
        with pytest.raises(ValueError):
            wilson(k, n, level)


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs() -> None:
    rng = np.random.default_rng(0)
    for share in (0.3, 0.5, 0.62):
        first, second = rng.random(200) < 0.55, rng.random(200) < share
        wins, losses = int((first & ~second).sum()), int((second & ~first).sum())
        assert mcnemar(first, second) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, rel=1e-9)


def test_mcnemar_by_hand() -> None:
    assert mcnemar([True] * 5 + [False], [False] * 5 + [False]) == 2 / 2**5
    assert mcnemar([True, False], [True, False]) == 1.0
    assert mcnemar([True, False], [False, True]) == 1.0


def test_bootstrap_has_the_closed_forms_centre_and_width() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.random(2000) < 0.6, rng.random(2000) < 0.5
    difference = paired_bootstrap(first, second, iterations=40_000)
    values = first.astype(float) - second.astype(float)
    assert difference.mean == pytest.approx(values.mean(), abs=1e-12)
    half = stats.norm.ppf(0.975) * values.std() / np.sqrt(len(values))
    assert difference.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert difference.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_pairing_matters_and_the_seed_repeats() -> None:
    """Answers that agree question by question leave no doubt about the difference; unpaired ones would."""
    answers = [True, False] * 100
    same = paired_bootstrap(answers, answers)
    assert (same.mean, same.low, same.high, same.n) == (0.0, 0.0, 0.0, 200)
    crossed = paired_bootstrap(answers, answers[::-1], seed=3)
    assert crossed.low < 0 < crossed.high
    assert crossed == paired_bootstrap(answers, answers[::-1], seed=3)


def test_unequal_lengths_are_refused() -> None:
    for function in (paired_bootstrap, mcnemar):
        with pytest.raises(ValueError, match="equal lengths"):
            function([True], [True, False])
    with pytest.raises(ValueError, match="at least one pair"):
        paired_bootstrap([], [])
