"""Effects and collapse against plain float64 references and cases worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from laavit.evaluation.interventions.collapse import collapse, effective_rank, likeness, pairwise_cosine
from laavit.evaluation.interventions.effects import effect, kl, latent_shift, share
from laavit.evaluation.interventions.observing import centre_of
from laavit.evaluation.interventions.states import FirstAnswer, LatentStates
from laavit.evaluation.statistics import mcnemar, paired_bootstrap, wilson


def held(final: Tensor, seen: list[bool] | None = None) -> LatentStates:
    return LatentStates(torch.zeros(len(final), 0, 0), final, torch.tensor(seen or [True] * len(final)))


def test_kl_by_hand() -> None:
    """p = (1/2, 1/2, 0) and q = (1/4, 3/4, 0): ln 2 / 2 + ln(2/3) / 2; of itself 0; not symmetric."""
    p, q = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.75, 0.0]).log()
    assert kl(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-7)
    assert kl(q, p) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-7)
    assert kl(p, p) == 0.0
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, two = logits.log_softmax(-1)
    assert kl(one, two) == pytest.approx(float((one.exp() * (one - two)).sum()), rel=1e-12)


def test_shift_by_hand() -> None:
    """One latent turned by 90 degrees, one by 180, one not seen: (1 + 2) / 2. The centre is taken off both."""
    before = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    after = torch.tensor([[0.0, 3.0], [0.0, -1.0], [9.0, 1.0]])
    assert latent_shift(held(before), held(after, [True, True, False])) == pytest.approx(1.5)
    assert latent_shift(held(before), held(before)) == pytest.approx(0.0, abs=1e-12)
    assert latent_shift(held(before, [False] * 3), held(after)) is None
    centre = torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]])
    [one] = [latent_shift(held(before[:1]), held(after[:1]), centre[:1])]
    assert one == pytest.approx(1 - 4 / math.sqrt(17))  # (0, 1) and (-1, 4)


def test_the_centre_is_a_mean_over_those_that_were_read() -> None:
    one, two = torch.tensor([[1.0, 0.0], [5.0, 5.0]]), torch.tensor([[3.0, 2.0], [7.0, 7.0]])
    found = centre_of([held(one), held(two, [True, False])])
    assert found is not None and found.tolist() == [[2.0, 1.0], [5.0, 5.0]]
    assert centre_of([]) is None


def test_collapse_by_hand() -> None:
    """Identical latents: cosine 1, rank 1; orthogonal ones: 0 and K; opposite ones: -1 and rank 1."""
    same = torch.tensor([[1.0, 2.0, 2.0, 0.0]]).repeat(4, 1)
    assert pairwise_cosine(same) == pytest.approx(1.0) and effective_rank(same) == pytest.approx(1.0)
    other = 3.0 * torch.eye(4, 6)
    assert pairwise_cosine(other) == pytest.approx(0.0) and effective_rank(other) == pytest.approx(4.0)
    assert pairwise_cosine(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(-1.0)
    shares = torch.tensor([3.0, 1.0]) / 4  # singular values 3 and 1
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        math.exp(-sum(p * math.log(p) for p in shares.tolist()))
    )
    assert effective_rank(torch.zeros(3, 2)) == 0.0


def test_collapse_against_plain_loops() -> None:
    states = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1
    found = collapse([held(one) for one in states])
    assert found is not None and found["latents"] == 3

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    within = [[cosine(one[i], one[j]) for i in range(3) for j in range(i)] for one in states]
    assert found["pairwise_cosine"][0] == pytest.approx(sum(map(sum, within)) / 15)
    assert found["pairwise_cosine"][1] < found["pairwise_cosine"][0] < found["pairwise_cosine"][2]
    across = [
        sum(cosine(states[i, k], states[j, k]) for k in range(3) for j in range(5) if j != i) / 12 for i in range(5)
    ]
    assert likeness(states).tolist() == pytest.approx(across)
    assert found["across_cosine"][0] == pytest.approx(sum(across) / 5)
    ranks = []
    for one in states:
        values = torch.linalg.svd(one).S
        p = values / values.sum()
        ranks.append(float(torch.exp(-(p * p.log()).sum())))
    assert found["effective_rank"][0] == pytest.approx(sum(ranks) / 5)
    spread = [effective_rank(states[:, k] - states[:, k].mean(0)) for k in range(3)]
    assert found["across_rank"] == pytest.approx(sum(spread) / 3)


def test_collapse_of_little() -> None:
    """Latents that were not all read do not count; one question and one latent have nothing to be compared with."""
    one = torch.tensor([[1.0, 2.0]])
    assert collapse([held(one.repeat(2, 1), [True, False])]) is None and collapse([]) is None
    found = collapse([held(one)])
    assert found is not None
    assert (found["pairwise_cosine"], found["across_cosine"], found["across_rank"]) == (None, None, None)
    assert found["effective_rank"] == pytest.approx([1.0, 1.0, 1.0])


def record(number: int, prediction: str, correct: bool, **more: Any) -> dict[str, Any]:
    return {"task": "t", "id": str(number), "prediction": prediction, "correct": correct, **more}


def test_an_effect_of_four_questions() -> None:
    reference = [record(i, "yes", i < 3) for i in range(4)]
    answered = [
        record(0, "yes", True, kl=0.0),
        record(1, "no", False, kl=1.0),
        record(2, "no", False, kl=0.5),
        record(3, "no", True, kl=0.5, latent_shift=None),
    ]
    found = effect("latents", reference, answered)
    assert (found["on"], found["n"]) == ("latents", 4)
    assert found["accuracy"] == [0.5, *wilson(2, 4)] and found["changed"] == [0.75, *wilson(3, 4)]
    before, after = [True, True, True, False], [True, False, False, True]
    delta = paired_bootstrap(after, before)
    assert found["delta"] == [-0.25, delta.low, delta.high] and found["p"] == mcnemar(after, before)
    assert found["kl"][0] == 0.5 and found["kl"][1] <= 0.5 <= found["kl"][2]
    assert found["latent_shift"] is None and found["latent_shift_centred"] is None
    with pytest.raises(ValueError, match="same questions"):
        effect("image", reference[1:], answered)
    assert share([True]) == [1.0, *wilson(1, 1)]


def test_the_first_answer_token_comes_after_markup() -> None:
    """Row 0 answers at once, row 1 after two latents, row 2 never: the last scores seen stay."""
    first, steps = FirstAnswer({3, 4}), torch.randn(3, 3, 6, generator=torch.Generator().manual_seed(2))
    for scores, chosen in zip(steps, ([0, 3, 3], [3, 4, 4], [1, 2, 4]), strict=True):
        scores[range(3), chosen] = 9.0
        assert first(torch.zeros(3, 1), scores) is scores
    wanted = torch.stack([steps[0, 0], steps[2, 1], steps[2, 2]])
    wanted[:, [3, 4]] = -torch.inf  # markup is no word that an answer could begin with
    assert torch.equal(first.log_shares, wanted.log_softmax(-1))
    plain = FirstAnswer(set())
    for scores in steps:
        plain(torch.zeros(3, 1), scores)
    assert torch.equal(plain.log_shares, steps[0].log_softmax(-1))
