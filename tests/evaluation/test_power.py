"""Power against the closed form, the exact sum and a simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from laavit.evaluation.power import detectable_gain, independent_discordance, mcnemar_power, questions_needed
from laavit.evaluation.statistics import mcnemar
from laavit.registry import UserError


def test_connors_formula_by_hand() -> None:
    """d = .1, ψ = .2: (1.959964 · √.2 + .841621 · √.19)² / .01 = 154.56."""
    assert questions_needed(0.1, 0.2) == 155
    z, b = stats.norm.ppf(0.975), stats.norm.ppf(0.9)
    expected = (z * np.sqrt(0.3) + b * np.sqrt(0.3 - 0.0025)) ** 2 / 0.0025
    assert questions_needed(-0.05, 0.3, power=0.9) == int(np.ceil(expected))


def test_independence_is_the_discordance_of_independent_answers() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random(400_000) < 0.65, rng.random(400_000) < 0.6
    assert independent_discordance(0.6, 0.05) == pytest.approx((first != second).mean(), abs=0.003)
    assert independent_discordance(0.6, 0.05) == pytest.approx(0.65 * 0.4 + 0.35 * 0.6)


@pytest.mark.parametrize(("n", "gain", "discordance"), [(60, 0.15, 0.3), (155, 0.1, 0.2), (30, 0.2, 0.2)])
def test_the_exact_power_is_the_simulated_one(n: int, gain: float, discordance: float) -> None:
    rng = np.random.default_rng(1)
    wins, losses = (discordance + gain) / 2, (discordance - gain) / 2
    draws = rng.multinomial(n, [wins, losses, 1 - discordance], size=3000)
    found = []
    for won, lost, _ in draws:
        first = np.r_[np.ones(won, bool), np.zeros(lost, bool)]
        found.append(mcnemar(first, ~first) <= 0.05)
    assert mcnemar_power(n, gain, discordance) == pytest.approx(np.mean(found), abs=0.025)


def test_the_formula_s_number_gives_about_the_power_asked_for() -> None:
    for gain, discordance in ((0.05, 0.15), (0.1, 0.3), (0.03, 0.47)):
        n = questions_needed(gain, discordance)
        assert 0.76 <= mcnemar_power(n, gain, discordance) <= 0.82
        assert mcnemar_power(n // 2, gain, discordance) < 0.6


def test_the_detectable_gain_turns_the_formula_round() -> None:
    for n, discordance in ((124, 0.2), (300, 0.1), (1500, None)):
        gain = detectable_gain(n, 0.6, discordance)
        assert gain is not None
        psi = independent_discordance(0.6, gain) if discordance is None else discordance
        assert questions_needed(gain, psi) == n
    assert detectable_gain(3, 0.6, 0.2) is None and detectable_gain(100, 1.0) is None


def test_nonsense_is_refused() -> None:
    for call in (
        lambda: questions_needed(0.2, 0.1),
        lambda: questions_needed(0.0, 0.1),
        lambda: questions_needed(0.1, 1.2),
        lambda: questions_needed(0.1, 0.2, power=1.0),
        lambda: detectable_gain(0, 0.5),
        lambda: detectable_gain(10, 1.5),
    ):
        with pytest.raises(UserError):
            call()
