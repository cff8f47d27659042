"""A row of semantics for each latent, and losses by name, against loops over samples, latents and permutations."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from laavit.registry import UserError
from laavit.structures import Role, StudentOutput, Tile, Trace
from laavit.targets.base import stack
from laavit.targets.concept import ConceptTarget, hungarian
from laavit.traces.semantics import select

WIDTH, TEACHER, LATENTS, SAMPLES = 6, 5, 3, 3
HEADER = {"width": TEACHER, "settings": {"semantics": "top_k_rows", "top_k": 8}}


def plain_head(state: Tensor, head: Any) -> Tensor:
    """phi of one state [D]: Linear-GELU-Linear (App. C.2), the exact GELU."""
    first = head[0].weight @ state + head[0].bias
    return head[2].weight @ (first * 0.5 * (1 + torch.erf(first / math.sqrt(2)))) + head[2].bias


def cos(p: Tensor, w: Tensor) -> Tensor:
    return (p * w).sum() / (p.square().sum().sqrt() * w.square().sum().sqrt())


def smooth(p: Tensor, w: Tensor) -> Tensor:
    return sum(d * d / 2 if d < 1 else d - 0.5 for d in (p - w).abs()) / len(p)


PLAIN = {"cosine": lambda p, w: 1 - cos(p, w), "mse": lambda p, w: (p - w).square().sum() / len(p), "smooth_l1": smooth}


def plain_loss(predicted: Tensor, wanted: Tensor, loss: str) -> Tensor:
    """[B, A, D], [B, A, D] -> the mean over samples and anchors."""
    total, (samples, anchors) = torch.zeros((), dtype=torch.float64), predicted.shape[:2]
    for b in range(samples):
        for a in range(anchors):
            if loss == "info_nce":
                scores = torch.stack([cos(predicted[b, a], wanted[c, a]) / 0.07 for c in range(samples)])
                total = total - scores[b] + scores.exp().sum().log()
            else:
                total = total + PLAIN[loss](predicted[b, a], wanted[b, a])
    return total / (samples * anchors)


def rows_trace(seed: int, semantics: str, k: int = 8, tokens: int = 20) -> tuple[Trace, Tensor]:
    """What the extraction stores under a setting of ``extract.semantics``, and all rows by falling gaze."""
    generator = torch.Generator().manual_seed(seed)
    states, gaze = torch.randn(tokens, TEACHER, generator=generator), torch.rand(tokens, generator=generator)
    kept, chosen = select(states, gaze, semantics, k)
    trace = Trace(f"s{seed}", "blue", (Tile(1, tokens),), gaze, kept, 0.5, chosen)
    return trace, states[torch.tensor(sorted(range(tokens), key=lambda i: -gaze[i].item()))]


@pytest.fixture
def parts() -> tuple[Tensor, Tensor]:
    """Hidden states [B, 8, D], roles with the latents at different places."""
    torch.manual_seed(0)
    roles = torch.full((SAMPLES, 8), int(Role.QUESTION))
    for b in range(SAMPLES):
        roles[b, b + 1 : b + 1 + LATENTS] = Role.LATENT
    return torch.randn(SAMPLES, 8, WIDTH, dtype=torch.float64, requires_grad=True), roles


def check(target: ConceptTarget, parts: tuple[Tensor, Tensor], prepared: dict[str, Tensor], wanted: Any) -> None:
    """Value and gradients of the target against ``wanted(predicted) -> rows [B, A, D]`` and the plain loss."""
    hidden, roles = parts
    got = target(StudentOutput(hidden, torch.empty(0), torch.empty(0)), roles, prepared)
    states = torch.stack([hidden[b, b + 1 : b + 1 + LATENTS] for b in range(SAMPLES)])
    states = states[:, -1:] if target.anchor == "last" else states
    predicted = torch.stack([torch.stack([plain_head(state, target.head) for state in each]) for each in states])
    expected = plain_loss(predicted, wanted(predicted.detach()), target.loss)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    inputs = [hidden, *target.parameters()]
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("loss", ["cosine", "mse", "smooth_l1", "info_nce"])
@pytest.mark.parametrize("match", ["none", "order", "hungarian"])
def test_losses_and_matches(parts: tuple[Tensor, Tensor], loss: str, match: str) -> None:
    target = ConceptTarget(anchor="last" if match == "none" else "all", loss=loss, match=match, top_k=5)
    target.setup(WIDTH, 2, LATENTS, HEADER)
    target.double()
    # samples of eight, six and four tokens: the rows that are matched differ in number
    traces = [rows_trace(seed, "top_k_rows", 8, tokens) for seed, tokens in enumerate((20, 6, 4))]
    encoded: Any = None
    prepared = stack([target.prepare(encoded, trace) for trace, _ in traces])
    strongest = [rows[:5].double() for _, rows in traces]

    def wanted(predicted: Tensor) -> Tensor:
        if match == "none":
            return prepared["semantics"].double()[:, None]
        if match == "order":
            return torch.stack([rows[:LATENTS] for rows in strongest])
        best, measure = [], PLAIN["cosine" if loss == "info_nce" else loss]
        for given, rows in zip(predicted, strongest, strict=True):
            choices = permutations(range(len(rows)), LATENTS)
            costs = {c: sum(float(measure(given[j], rows[i])) for j, i in enumerate(c)) for c in choices}
            best.append(rows[list(min(costs, key=costs.__getitem__))])
        return torch.stack(best)

    check(target, parts, prepared, wanted)


def test_all_rows_or_the_stored_ones_are_the_same_rows() -> None:
    target = ConceptTarget(anchor="all", match="order", top_k=4)
    encoded: Any = None
    for name in ("full", "top_k_rows"):
        target.setup(WIDTH, 2, LATENTS, {**HEADER, "settings": {"semantics": name, "top_k": 8}})
        trace, rows = rows_trace(1, name)
        assert torch.equal(target.prepare(encoded, trace)["semantics"], rows[:4])


def test_hungarian_follows_a_permutation_and_takes_no_row_twice() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 5, 4, dtype=torch.float64)
    order = torch.tensor([3, 0, 4])
    present = torch.tensor([[True] * 5, [True] * 5])
    valid = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(hungarian(rows[:, order] + 1e-3, valid, rows, present, "mse"), rows[:, order])
    same = rows[:, :1].expand(2, 3, 4)  # three latents that want one row share the rows out
    found = hungarian(same, valid, rows, present, "mse")
    assert all(len({tuple(row) for row in each.tolist()}) == 3 for each in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "cosin"}, "did you mean 'cosine'"),
        ({"match": "hungarain", "anchor": "all"}, "did you mean 'hungarian'"),
        ({"match": "order"}, "so anchor is 'all', got 'last'"),
        ({"temperature": 0.0}, "above 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ConceptTarget(**arguments)


def test_setup_refuses_traces_that_do_not_hold_the_rows() -> None:
    target = ConceptTarget(anchor="all", match="order")
    with pytest.raises(UserError, match=r"these traces hold pooled semantics \(gaze_top_k\); extract with"):
        target.setup(WIDTH, 2, LATENTS, {"width": 5, "settings": {"semantics": "gaze_top_k"}})
    with pytest.raises(UserError, match="9 latents need as many rows, and top_k leaves 8"):
        target.setup(WIDTH, 2, 9, HEADER)
    with pytest.raises(UserError, match="made by 'qwen', which is no static encoder"):
        ConceptTarget(static=True).setup(WIDTH, 2, LATENTS, {"width": 5, "teacher": "qwen"})
    ConceptTarget(static=True).setup(WIDTH, 2, LATENTS, {"width": 5, "static": "cls"})
    target.setup(WIDTH, 2, LATENTS, HEADER)
    encoded: Any = None
    with pytest.raises(UserError, match=r"sample 's0' cannot be a target: 3 latents need as many rows .* it holds 2"):
        target.prepare(encoded, rows_trace(0, "top_k_rows", tokens=2)[0])
