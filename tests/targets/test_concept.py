"""Semantic reconstruction against Eq. 6 written out, in float64, values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from laavit.registry import UserError
from laavit.structures import Role, Sample, StudentOutput, Tile, Trace
from laavit.targets.base import stack
from laavit.targets.concept import ConceptTarget, concept_loss
from laavit.traces.semantics import POOLINGS, select

WIDTH, TEACHER, LATENTS = 6, 5, 3


def plain_head(state: Tensor, head: Any) -> Tensor:
    """phi of one state [D]: Linear-GELU-Linear (App. C.2), the exact GELU."""
    first = head[0].weight @ state + head[0].bias
    middle = torch.stack([x * 0.5 * (1 + torch.erf(x / math.sqrt(2))) for x in first])
    return head[2].weight @ middle + head[2].bias


def plain_concept(states: Tensor, semantics: Tensor, head: Any, anchor: str) -> Tensor:
    """1 - cos(phi(h_z), V_sem) with loops over samples and anchors: [B, K, D], [B, D_t] -> scalar."""
    losses = []
    for sample, wanted in zip(states, semantics, strict=True):
        chosen = {"last": [sample[-1]], "mean": [sum(sample) / len(sample)], "all": list(sample)}[anchor]
        for state in chosen:
            given = plain_head(state, head)
            losses.append(1 - (given * wanted).sum() / (given.square().sum().sqrt() * wanted.square().sum().sqrt()))
    return sum(losses) / len(losses)


def output(hidden: Tensor) -> StudentOutput:
    return StudentOutput(hidden, logits=torch.empty(0), labels=torch.empty(0))


@pytest.fixture
def parts() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [2, 8, D], roles with the latents at different places, V_sem."""
    torch.manual_seed(0)
    roles = torch.full((2, 8), int(Role.QUESTION))
    roles[0, 2:5], roles[1, 4:7] = Role.LATENT, Role.LATENT
    hidden = torch.randn(2, 8, WIDTH, dtype=torch.float64, requires_grad=True)
    return hidden, roles, torch.randn(2, TEACHER, dtype=torch.float32)


@pytest.mark.parametrize("anchor", ["last", "mean", "all"])
def test_concept_target_equals_equation_6(parts: tuple[Tensor, Tensor, Tensor], anchor: str) -> None:
    hidden, roles, semantics = parts
    target = ConceptTarget(anchor=anchor, hidden=7)
    target.setup(WIDTH, 2, LATENTS, {"width": TEACHER})
    target.double()
    got = target(output(hidden), roles, {"semantics": semantics})
    states = torch.stack([hidden[0, 2:5], hidden[1, 4:7]])
    expected = plain_concept(states, semantics.double(), target.head, anchor)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    inputs = [hidden, *target.parameters()]
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_gradient_reaches_the_anchors_only(parts: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, roles, semantics = parts
    target = ConceptTarget()
    target.setup(WIDTH, 2, LATENTS, {"width": TEACHER})
    (gradient,) = torch.autograd.grad(target.double()(output(hidden), roles, {"semantics": semantics}), hidden)
    assert gradient.abs().sum(-1).nonzero().tolist() == [[0, 4], [1, 6]]  # each sample's last latent


def test_bounds_and_scale() -> None:
    vector = torch.randn(3, 4, dtype=torch.float64)
    assert concept_loss(2.5 * vector, vector) == pytest.approx(0, abs=1e-12)
    assert concept_loss(-vector, vector) == pytest.approx(2)


def test_the_head_stays_in_its_own_precision(parts: tuple[Tensor, Tensor, Tensor]) -> None:
    """A bf16 student meets a float32 head: the loss is float32 and its gradient arrives."""
    hidden, roles, semantics = parts
    target = ConceptTarget()
    target.setup(WIDTH, 2, LATENTS, {"width": TEACHER})
    states = hidden.detach().bfloat16().requires_grad_()
    loss = target(output(states), roles, {"semantics": semantics})
    loss.backward()
    assert loss.dtype == torch.float32 and states.grad is not None and states.grad.abs().sum() > 0


def rows_trace(states: Tensor, gaze: Tensor, semantics: str, k: int = 8) -> Trace:
    """What the extraction stores of image states [N, D] under a setting of ``extract.semantics``."""
    kept, tokens = select(states, gaze, semantics, k)
    return Trace("a", "blue", (Tile(4, 5),), gaze, kept, 0.5, tokens)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_rows_are_pooled_as_the_extraction_would_have(pooling: str) -> None:
    torch.manual_seed(1)
    states, gaze = torch.randn(20, TEACHER), torch.rand(20)
    target = ConceptTarget(pooling=pooling, top_k=6)
    encoded: Any = None  # the student's sequence does not matter
    full = target.prepare(encoded, rows_trace(states, gaze, "full"))["semantics"]
    assert torch.equal(full, rows_trace(states, gaze, pooling, 6).semantics)
    kept = target.prepare(encoded, rows_trace(states, gaze, "top_k_rows", 8))["semantics"]
    strongest = gaze.argsort(descending=True)[:8]
    scaled = (gaze - gaze.min()) / (gaze.max() - gaze.min() + 1e-8)
    count = {"gaze_top_k": 6, "gaze": 8, "mean": 8}[pooling]
    weights = torch.ones(8) if pooling == "mean" else scaled[strongest[:count]]
    plain = (weights / weights.sum()) @ states[strongest[:count]]
    torch.testing.assert_close(kept, plain)


def test_pooled_traces_are_taken_as_they_are() -> None:
    torch.manual_seed(1)
    trace = rows_trace(torch.randn(20, TEACHER), torch.rand(20), "mean")
    found = [ConceptTarget(pooling=each).prepare(None, trace)["semantics"] for each in POOLINGS]  # type: ignore[arg-type]
    assert all(torch.equal(each, trace.semantics) for each in found)


def test_gradients_are_alive_with_stored_rows(lab: Any, samples: list[Sample]) -> None:
    """A whole step of a student: each pooling leads the latents elsewhere, and every trained part moves."""
    model = lab.model({"concept": ConceptTarget()})
    batch, moved = lab.batch(model, samples), {}
    torch.manual_seed(2)
    traces = [rows_trace(torch.randn(20, lab.width), torch.rand(20, dtype=torch.float64) ** 3, "full") for _ in samples]
    for pooling in POOLINGS:
        target = ConceptTarget(pooling=pooling)
        batch.targets["concept"] = stack([target.prepare(None, trace) for trace in traces])  # type: ignore[arg-type]
        model.zero_grad()
        model(batch)["loss"].backward()
        table = model.student.model.get_input_embeddings().weight.grad
        latents = batch.input_ids[batch.roles == Role.LATENT].unique()
        assert (table[latents].abs().sum(-1) > 0).all()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.targets.parameters())
        moved[pooling] = table[latents].clone()
    assert not torch.allclose(moved["gaze"], moved["mean"]) and not torch.allclose(moved["gaze"], moved["gaze_top_k"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anchor": "lats"}, "did you mean 'last'"),
        ({"pooling": "gaze_topk"}, "did you mean 'gaze_top_k'"),
        ({"top_k": 0}, "at least 1"),
        ({"weight": -1.0}, "not negative"),
        ({"weight": math.nan}, "got nan"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ConceptTarget(**arguments)


def test_a_student_without_latents_is_refused() -> None:
    with pytest.raises(UserError, match="has no latents"):
        ConceptTarget().setup(WIDTH, 2, 0, {"width": TEACHER})
