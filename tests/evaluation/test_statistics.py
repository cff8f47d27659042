"""Intervals and tests against closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from laavit.evaluation.statistics import (
    benjamini_hochberg,
    bootstrap,
    holm,
    mcnemar,
    paired_bootstrap,
    pooled,
    pooled_difference,
    wilson,
)


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


def two_way(rng: np.random.Generator, seeds: int, questions: int, spread: float) -> np.ndarray:
    """[S, n] right or wrong: questions are easy or hard for all seeds, and seeds differ by ``spread``."""
    hardness, luck = rng.normal(0, 1.5, questions), rng.normal(0, spread, (seeds, 1))
    return rng.random((seeds, questions)) < 1 / (1 + np.exp(-(0.5 + hardness + luck)))


def test_one_seed_is_the_bootstrap_over_questions() -> None:
    rng = np.random.default_rng(2)
    first, second = rng.random(400) < 0.6, rng.random(400) < 0.5
    known, ours = paired_bootstrap(first, second), pooled_difference(first, second)
    assert ours.mean == pytest.approx(known.mean, abs=1e-12) and ours.seeds == (1, 1) and ours.n == 400
    assert (ours.low, ours.high) == pytest.approx((known.low, known.high), abs=0.006)
    alone = pooled(first)
    assert alone.sd is None and alone.mean == first.mean()
    half = 1.96 * np.sqrt(first.var() / 400)
    assert (alone.low, alone.high) == pytest.approx((first.mean() - half, first.mean() + half), abs=0.004)


def test_pooling_has_the_two_way_variance() -> None:
    """Seeds that agree on every question are worth one; the seeds' own variance is s² / S, without bias."""
    rng = np.random.default_rng(3)
    same = np.tile(rng.random(500) < 0.7, (4, 1))
    assert pooled(same).low == pytest.approx(pooled(same[:1]).low, abs=0.003) and pooled(same).sd == 0.0
    # constant rows: nothing but seeds vary, and the interval is Student's
    values = np.repeat([[0.2], [0.4], [0.9]], 50, axis=1)
    found = pooled(values, iterations=40_000)
    assert found.mean == pytest.approx(0.5) and found.sd == pytest.approx(np.std([0.2, 0.4, 0.9], ddof=1))
    half = stats.t.ppf(0.975, 2) * found.sd / np.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), rel=0.05)


@pytest.mark.parametrize("seeds", [2, 5])
def test_the_pooled_interval_covers_new_seeds_and_questions(seeds: int) -> None:
    """Over worlds with other seeds and other questions, the 90 % interval holds the truth about as often as it says.

    Questions alone (every answer taken as a question of its own) would hold it far less often.
    """
    rng = np.random.default_rng(4)
    truth = two_way(np.random.default_rng(5), 2000, 2000, 0.3).mean()
    covered, naive, repeats = 0, 0, 250
    for i in range(repeats):
        world = two_way(rng, seeds, 150, 0.3)
        found = pooled(world, level=0.9, iterations=400, seed=i)
        covered += found.low <= truth <= found.high
        low, high = wilson(int(world.sum()), world.size, 0.9)
        naive += low <= truth <= high
    assert 0.84 <= covered / repeats <= 0.97
    assert naive / repeats < 0.75


def test_macro_is_the_mean_of_the_strata() -> None:
    values = np.array([[1.0] * 8 + [0.0] * 2 + [1.0, 0.0]])
    kinds = ["a"] * 10 + ["b"] * 2
    assert pooled(values, strata=kinds).mean == pytest.approx((0.8 + 0.5) / 2)
    assert pooled(values).mean == pytest.approx(9 / 12)
    # each stratum is redrawn in itself: var = (p q / n of each) / 4
    found = pooled(np.array([[1.0, 0.0] * 200 + [1.0, 0.0] * 20]), strata=["a"] * 400 + ["b"] * 40)
    half = 1.96 * np.sqrt((0.25 / 400 + 0.25 / 40) / 4)
    assert found.high - found.mean == pytest.approx(half, rel=0.08)


def test_questions_about_one_image_are_drawn_together() -> None:
    """Four questions an image, all right or all wrong: as much is known as from one question an image."""
    rng = np.random.default_rng(6)
    images = rng.random(100) < 0.6
    answers, keys = np.repeat(images, 4), [i // 4 for i in range(400)]
    grouped, single = pooled(answers, clusters=keys), pooled(images)
    assert (grouped.low, grouped.high) == pytest.approx((single.low, single.high), abs=0.012)
    assert pooled(answers).high - pooled(answers).low < 0.6 * (grouped.high - grouped.low)
    with pytest.raises(ValueError, match="strata and clusters"):
        pooled(answers, strata=keys, clusters=keys)
    with pytest.raises(ValueError, match="each question needs a label"):
        pooled(answers, clusters=keys[:-1])


def test_a_difference_of_arms_pairs_the_questions() -> None:
    rng = np.random.default_rng(7)
    hard = rng.normal(0, 3, 300)

    def arm(seeds: int, shift: float) -> np.ndarray:
        return rng.random((seeds, 300)) < 1 / (1 + np.exp(-(hard + shift)))

    first, second = arm(6, 1.5), arm(6, 0.0)
    found, one, two = pooled_difference(first, second), pooled(first), pooled(second)
    assert found.seeds == (6, 6) and found.mean == pytest.approx(one.mean - two.mean)
    assert found.high - found.low < 0.85 * np.hypot(one.high - one.low, two.high - two.low)
    assert found.p is not None and found.p < 0.01 and found.low > 0
    assert pooled_difference(second[:3], second[3:]).p > 0.05
    same = arm(2, 0.0)
    assert pooled_difference(same[:1], same[:1]).p == 1.0
    with pytest.raises(ValueError, match="equal lengths"):
        pooled_difference(same, same[:, :-1])


def test_bootstrap_of_any_statistic_is_scipys() -> None:
    values = np.random.default_rng(8).gamma(2.0, size=120)
    for statistic in (np.mean, np.median):
        expected = stats.bootstrap((values,), statistic, method="percentile", n_resamples=20_000, rng=1)
        mean, low, high = bootstrap(values, statistic, iterations=20_000)
        assert mean == statistic(values)
        known = expected.confidence_interval
        assert (low, high) == pytest.approx((known.low, known.high), abs=0.02)
    pairs = np.stack([values, values**2], axis=1)  # a statistic of two columns

    def ratio(given: np.ndarray, axis: int) -> np.ndarray:
        total = given.sum(axis=axis)
        return total[..., 1] / total[..., 0]

    mean, low, high = bootstrap(pairs, ratio, iterations=2000)
    assert low < mean < high and mean == pytest.approx((values**2).sum() / values.sum())
    whole = bootstrap(np.repeat(values, 3), np.mean, clusters=np.repeat(np.arange(120), 3).tolist(), iterations=4000)
    assert whole == pytest.approx(bootstrap(values, np.mean, iterations=4000), abs=0.03)
    with pytest.raises(ValueError, match="at least one sample"):
        bootstrap(np.array([]))


def test_adjusted_p_values_by_hand_and_scipys() -> None:
    ps = [0.01, 0.04, 0.03, 0.005]
    assert holm(ps) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # 4 · .005, 3 · .01, 2 · .03, then never below it
    assert benjamini_hochberg(ps) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    rng = np.random.default_rng(9)
    for size in (1, 7, 40):
        ps = rng.random(size).tolist()
        assert benjamini_hochberg(ps) == pytest.approx(stats.false_discovery_control(ps).tolist(), abs=1e-12)
        assert all(h >= b - 1e-12 for h, b in zip(holm(ps), benjamini_hochberg(ps), strict=True))
    assert holm([]) == [] and holm([0.7, 0.6]) == [1.0, 1.0]


def test_paired_runs_let_what_a_seed_does_to_both_cancel() -> None:
    """Seeds 0.3 apart, and a gain of about 0.1 in each: by hand, the mean and a t interval of the runs' differences."""
    rng = np.random.default_rng(3)
    base = [rng.random(2000) < level for level in (0.3, 0.6, 0.9)]
    better = [one | (rng.random(2000) < 0.2) for one in base]
    first, second = np.array(better), np.array(base)
    gains = first.mean(1) - second.mean(1)
    found, loose = pooled_difference(first, second, paired=True), pooled_difference(first, second)
    assert found.mean == pytest.approx(gains.mean()) == pytest.approx(loose.mean)
    assert found.sd == pytest.approx(gains.std(ddof=1))
    half = 4.302653 * gains.std(ddof=1) / 3**0.5  # Student's t, 2 degrees, 97.5 %
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    assert loose.high - loose.low > 3 * (found.high - found.low)
    with pytest.raises(ValueError, match="paired runs need equal numbers, got 3 and 2"):
        pooled_difference(first, second[:2], paired=True)
