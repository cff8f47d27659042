"""Intervals and tests over samples, against closed forms, full enumerations and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from laavit.evaluation.analyses.gap import cka
from laavit.evaluation.analyses.intervals import (
    CHUNK,
    bootstrap,
    contrast,
    interval,
    intervals,
    jackknife,
    means,
    permutation_p,
    ratio,
    resamples,
)

RANDOM = np.random.default_rng(0)


def test_draws_hold_every_sample_once_on_average_and_repeat() -> None:
    blocks = list(resamples(7, CHUNK + 3, seed=1))
    assert [len(block) for block in blocks] == [CHUNK, 3]
    drawn = np.concatenate(blocks)
    assert (drawn.sum(1) == 7).all() and drawn.mean(0) == pytest.approx(np.ones(7), abs=0.2)
    assert (np.concatenate(list(resamples(7, CHUNK + 3, seed=1))) == drawn).all()


def test_the_bootstrap_of_a_share_is_the_binomials() -> None:
    values = np.repeat([1.0, 0.0], [30, 70])
    ((mean, low, high),) = means(values[:, None])
    expected = stats.binom(100, 0.3).ppf([0.025, 0.975]) / 100
    assert mean == pytest.approx(0.3) and [low, high] == pytest.approx(expected, abs=0.011)


def test_a_ratio_weighs_clusters_by_their_size() -> None:
    """Samples of 1 and of 3 tokens: the mean over tokens, and a sample without tokens says nothing."""
    value, draws = bootstrap(ratio([[1.0], [9.0], [0.0]], [[1], [3], [0]]), 3, 200)
    assert value == pytest.approx([2.5])
    known = draws[~np.isnan(draws)]
    # a draw of the first i and j times the second: (i + 9 j) / (i + 3 j)
    possible = [(i + 9 * j) / (i + 3 * j) for i in range(4) for j in range(4 - i) if i + j]
    assert len(known) < len(draws) and set(np.round(known, 9)) == set(np.round(possible, 9))
    assert interval(math.nan, draws[:, 0]) is None and interval(1.0, np.array([math.nan])) is None


def test_statistics_share_their_draws() -> None:
    values = RANDOM.normal(size=(40, 2))
    both = intervals([ratio(values, np.ones_like(values)), ratio(values[:, :1], np.ones((40, 1)))], 40, 300)
    assert len(both) == 3 and both[2] == pytest.approx(both[0], rel=1e-12)


SIMPSON = {
    "values": [2.0, 2.0, 1.0, 10.0, 9.0, 9.0],
    "marked": [True, True, False, True, False, False],
    "strata": [0, 0, 0, 1, 1, 1],
}


def test_a_contrast_within_strata_can_turn_the_plain_one_round() -> None:
    """Within both strata the marked are higher by 1; over all they are lower by 19/3 - 14/3."""
    ones = np.ones((1, 6))
    assert contrast(SIMPSON["values"], SIMPSON["marked"])(ones)[0] == pytest.approx([-5 / 3])
    assert contrast(**SIMPSON)(ones)[0] == pytest.approx([1.0])


def test_a_contrast_is_the_coefficient_of_a_regression_with_stratum_means() -> None:
    values, marked, strata = RANDOM.normal(size=60), RANDOM.random(60) < 0.4, RANDOM.integers(0, 4, 60)
    weights = RANDOM.integers(0, 3, 60).astype(float)
    design = np.column_stack([marked, np.eye(4)[strata]]) * np.sqrt(weights)[:, None]
    expected = np.linalg.lstsq(design, values * np.sqrt(weights), rcond=None)[0][0]
    assert contrast(values, marked, strata)(weights[None])[0] == pytest.approx([expected], rel=1e-10)


def test_a_stratum_of_one_kind_has_no_say() -> None:
    found = contrast([1.0, 2.0, 7.0], [False, True, True], [0, 0, 1])(np.array([[1.0, 1, 1], [1, 0, 1]]))
    assert found[0] == pytest.approx([1.0]) and np.isnan(found[1, 0])


def test_the_permutation_test_is_the_exact_one() -> None:
    values, marked = RANDOM.normal(size=9), np.arange(9) < 4
    exact = stats.permutation_test(
        (values[marked], values[~marked]), lambda a, b: abs(a.mean() - b.mean()), alternative="greater"
    )
    assert permutation_p(values, marked) == pytest.approx(exact.pvalue, abs=0.02)
    assert permutation_p([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1]) == pytest.approx(2 / 20, abs=0.015)


def test_the_permutation_test_within_strata_is_the_exact_one() -> None:
    """Every way of marking 2 of 3 and 1 of 3, by hand: how many are at least as far from 0 as what was seen."""
    values, of = np.array(SIMPSON["values"]), contrast
    seen = abs(of(**SIMPSON)(np.ones((1, 6)))[0, 0])
    ways = [
        of(values, [i in (*a, *b) for i in range(6)], SIMPSON["strata"])(np.ones((1, 6)))[0, 0]
        for a in itertools.combinations(range(3), 2)
        for b in itertools.combinations(range(3, 6), 1)
    ]
    exact = np.mean(np.abs(ways) >= seen - 1e-9)
    assert permutation_p(**SIMPSON) == pytest.approx(exact, abs=0.02)
    # a stratum of 0, 0, 10, 10 whose 10s are marked: 2 of 6 ways; marks of the other stratum stay there
    values, marked = [0.0, 0, 10, 10, *[0.0] * 10], [False, False, True, True, *[True] * 8, False, False]
    assert permutation_p(values, marked, [0] * 4 + [1] * 10) == pytest.approx(1 / 3, abs=0.02)
    assert permutation_p([1.0, 2.0], [True, True]) is None


def test_leaving_one_out_of_a_mean_gives_its_standard_error() -> None:
    values = RANDOM.normal(size=15)
    found = jackknife(lambda rows: float(values[rows].mean()), np.arange(15))
    error = 1.96 * values.std(ddof=1) / math.sqrt(15)
    assert found == pytest.approx([values.mean(), values.mean() - error, values.mean() + error])
    assert jackknife(lambda rows: float(rows.mean()), np.zeros(5)) is None  # one sample: nothing can be left out
    assert jackknife(lambda rows: math.nan, np.arange(5)) is None


def brute_hsic(a: np.ndarray, b: np.ndarray) -> float:
    """The U-statistic over all four distinct rows."""
    found = [a[i, j] * (b[i, j] + b[q, r] - 2 * b[i, q]) for i, j, q, r in itertools.permutations(range(len(a)), 4)]
    return float(np.mean(found))


def test_cka_is_its_definition_by_four_loops() -> None:
    x, y = RANDOM.normal(size=(6, 3)), RANDOM.normal(size=(6, 5)) + 1
    a, b = x @ x.T, y @ y.T
    expected = brute_hsic(a, b) / math.sqrt(brute_hsic(a, a) * brute_hsic(b, b))
    assert cka(a, b) == pytest.approx(expected, rel=1e-9)


def test_cka_does_not_see_rotation_scale_or_origin_and_is_fair_to_few_rows() -> None:
    x = RANDOM.normal(size=(40, 8))
    turned = 3 * x @ np.linalg.qr(RANDOM.normal(size=(8, 8)))[0] + 5
    assert cka(x @ x.T, turned @ turned.T) == pytest.approx(1)
    other = [RANDOM.normal(size=(20, 200)) for _ in range(2)]  # plain CKA of these is about 0.9
    assert abs(cka(*(each @ each.T for each in other))) < 0.2
    assert math.isnan(cka(np.ones((9, 9)), x[:9] @ x[:9].T)) and math.isnan(cka(np.eye(3), np.eye(3)))
