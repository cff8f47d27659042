"""Samples with unequal numbers of latents in one batch, for every target: loops over samples and latents, float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from laavit.backbones.rows import row_positions
from laavit.model import LaViT
from laavit.recipe import Recipe
from laavit.structures import Encoded, Role, Sample, Step, StudentOutput, Trace
from laavit.targets import ConceptTarget, RegionTarget, Target, TrajectoryTarget
from laavit.targets.base import stack
from laavit.targets.steps import step_of_latent

#: of a store that holds all that any target asks for
HEADER = {
    "width": 24,
    "static": "cls",
    "teacher": "vit",
    "settings": {"semantics": "full", "top_k": 8, "steps": "token", "step_rows": "predicting", "answer": "gold"},
}
LATENTS, SEED, COUNTS = (1, 4), 1, [3, 1, 4]  # what samples a, b and c have under this seed
WIDTH, TEACHER = 6, 5
#: each way in which the number of latents reaches a target
NAMES = (
    *("concept_mean_latent", "concept_all_latents", "concept_ordered", "concept_hungarian", "region", "region_mean"),
    *("trajectory", "trajectory_steps", "trajectory_uniform", "box"),
)


def built(name: str) -> Target:
    target: Target = Recipe({"targets": {"t": name}}).build("targets.t")
    return target


def rich(lab: Any, item: Encoded) -> Trace:
    """A trace with three steps and all rows of semantics."""
    plain = lab.trace(item.sample)
    generator = torch.Generator().manual_seed(len(item.sample.question))
    maps = torch.rand(3, len(plain.gaze), generator=generator, dtype=torch.float64).square()
    states = torch.randn(len(plain.gaze), 24, generator=generator, dtype=torch.float64)
    steps = tuple(Step("word", "", gaze) for gaze in maps)
    return replace(plain, steps=steps, semantics=states, semantic_tokens=torch.arange(len(plain.gaze)))


def value(lab: Any, model: LaViT, items: list[Encoded]) -> Tensor:
    target = model.named_targets["t"]
    batch = lab.batch(lab.model({}, student=model.student), [item.sample for item in items], items=items)
    prepared = stack([target.prepare(item, rich(lab, item) if target.needs_trace else None) for item in items])
    return target(model.observe(replace(batch, targets={"t": prepared})), batch.roles, prepared)


@pytest.fixture(scope="module", params=[False, True], ids=["forced", "emitted"])
def student(request: pytest.FixtureRequest, lab: Any) -> Any:
    return lab.student(LATENTS, emitted=request.param, seed=SEED)


def test_the_samples_differ_in_latents(lab: Any, student: Any, samples: list[Sample]) -> None:
    items = lab.encode(lab.model({}, student=student), samples)
    assert [int((item.roles == Role.LATENT).sum()) for item in items] == COUNTS
    for item, count in zip(items, COUNTS, strict=True):  # the separator follows the last, whatever their number
        last = int((item.roles == Role.LATENT).nonzero().max())
        written = student.backbone.tokenizer.convert_ids_to_tokens(item.input_ids[last + 1 - count : last + 2].tolist())
        assert written == [f"<|latent_{i + 1}|>" for i in range(count)] + ["<|latent_end|>"]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_the_mean_of_its_samples(lab: Any, samples: list[Sample], name: str) -> None:
    """Values, and for two of them the gradient of every parameter."""
    student, target = lab.student(LATENTS, seed=SEED), built(name)
    torch.manual_seed(0)
    target.setup(student.backbone.width, student.backbone.depth, student.latents, HEADER)
    model = LaViT(student, None, {"t": target}).double().train()
    items, learns = lab.encode(model, samples), name in ("region", "trajectory_steps")
    with torch.set_grad_enabled(learns):
        together = value(lab, model, items)
        mean = torch.stack([value(lab, model, [item]) for item in items]).mean()
    torch.testing.assert_close(together, mean, rtol=1e-10, atol=1e-12)
    parameters = [p for _, p in model.trainable_parameters()] if learns else []
    found = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (together, mean) if learns]
    for one, other in zip(*found, strict=True) if learns else ():
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


def test_what_is_prepared_has_a_column_for_each_latent(lab: Any, student: Any, samples: list[Sample]) -> None:
    model = lab.model({}, student=student)
    region, steps = RegionTarget(), TrajectoryTarget(steps="steps")
    steps.setup(student.backbone.width, student.backbone.depth, student.latents, HEADER)
    for item, count in zip(lab.encode(model, samples), COUNTS, strict=True):
        assert region.prepare(item, None)["share"].shape[1] == count
        trace = rich(lab, item)
        maps = steps.prepare(item, trace)["gaze"].T
        assert len(maps) == count
        alone = TrajectoryTarget()
        for row, step in zip(maps, step_of_latent(3, count).tolist(), strict=True):
            assert torch.equal(row, alone.prepare(item, replace(trace, gaze=trace.steps[step].gaze))["gaze"])


def test_answer_maps_follow_the_answer_alone(lab: Any, student: Any, samples: list[Sample]) -> None:
    """Latents that the student writes itself are no words of the answer."""
    model = lab.model({}, student=student)
    items = lab.encode(model, samples)
    batch = lab.batch(model, samples, items=items)
    rows, target = row_positions(batch, "predicting"), TrajectoryTarget(steps="answer", rows=("predicting",))
    target.setup(student.backbone.width, student.backbone.depth, student.latents, HEADER)
    for b, item in enumerate(items):
        words = len(student.backbone.tokenizer.encode(item.sample.answer)) + 1
        own = rows[b][rows[b] >= 0]
        separator = int((item.roles == Role.LATENT).nonzero().max()) + 1
        assert own.tolist() == list(range(separator, separator + words))
        maps = target.prepare(item, rich(lab, item))["gaze"].T
        assert len(maps) == words and not maps[-1].any() and maps[:-1].any(-1).all()


# --- the concept target, written out ----------------------------------------------------------------------------------


@pytest.fixture
def parts() -> tuple[Tensor, Tensor, list[list[int]]]:
    """Hidden states [3, 9, D] with one, three and two latents, their roles, and where they stand."""
    torch.manual_seed(0)
    places = [[4], [2, 3, 4], [6, 7]]
    roles = torch.full((3, 9), int(Role.QUESTION))
    for b, own in enumerate(places):
        roles[b, own] = int(Role.LATENT)
    return torch.randn(3, 9, WIDTH, dtype=torch.float64, requires_grad=True), roles, places


def cos(p: Tensor, w: Tensor) -> Tensor:
    return (p * w).sum() / (p.square().sum().sqrt() * w.square().sum().sqrt())


def concept(target: ConceptTarget, parts: Any, prepared: dict[str, Tensor], losses: list[list[Tensor]]) -> None:
    """The mean over samples of the mean over a sample's own losses; values and gradients."""
    hidden, roles, _ = parts
    got = target(StudentOutput(hidden, torch.empty(0), torch.empty(0)), roles, prepared)
    expected = sum(sum(own) / len(own) for own in losses) / len(losses)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    inputs = [hidden, *target.parameters()]
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def set_up(**arguments: Any) -> ConceptTarget:
    target = ConceptTarget(**arguments)
    torch.manual_seed(1)
    target.setup(WIDTH, 2, 3, {"width": TEACHER, "settings": {"semantics": "top_k_rows", "top_k": 8}})
    return target.double()


@pytest.mark.parametrize("anchor", ["last", "mean", "all"])
def test_anchors(parts: Any, anchor: str) -> None:
    hidden, _, places = parts
    target, wanted = set_up(anchor=anchor), torch.randn(3, TEACHER, dtype=torch.float64)
    losses = []
    for b, own in enumerate(places):
        states = [hidden[b, place] for place in own]
        chosen = {"last": states[-1:], "mean": [sum(states) / len(states)], "all": states}[anchor]
        losses.append([1 - cos(target.head(state), wanted[b]) for state in chosen])
    concept(target, parts, {"semantics": wanted}, losses)


@pytest.mark.parametrize("match", ["order", "hungarian"])
def test_a_row_for_each_latent_there_is(parts: Any, match: str) -> None:
    hidden, _, places = parts
    target, rows = set_up(anchor="all", match=match), torch.randn(3, 4, TEACHER, dtype=torch.float64)
    losses = []
    for b, own in enumerate(places):
        given = [target.head(hidden[b, place]) for place in own]
        choices = [range(len(own))] if match == "order" else permutations(range(4), len(own))
        each = [[1 - cos(p, rows[b, i]) for p, i in zip(given, choice, strict=True)] for choice in choices]
        losses.append(min(each, key=lambda some: float(sum(some).detach())))
    concept(target, parts, {"semantics": rows, "present": torch.ones(3, 4, dtype=torch.bool)}, losses)


@pytest.mark.parametrize("match", ["none", "order"])
def test_info_nce(parts: Any, match: str) -> None:
    """Matched, latent j has its negatives among the samples that have it; one without negatives counts for nothing."""
    hidden, _, places = parts
    target = set_up(anchor="all", match=match, loss="info_nce")
    rows = torch.randn(3, 4, TEACHER, dtype=torch.float64)
    prepared = {"semantics": rows[:, 0]} if match == "none" else {"semantics": rows}
    losses: list[list[Tensor]] = [[], [], []]
    for b, own in enumerate(places):
        for j, place in enumerate(own):
            others = [c for c in range(3) if match == "none" or j < len(places[c])]
            if len(others) < 2:
                continue
            given = target.head(hidden[b, place])
            scores = {c: cos(given, rows[c, 0 if match == "none" else j]) / 0.07 for c in others}
            losses[b].append(torch.stack(list(scores.values())).exp().sum().log() - scores[b])
    assert [len(own) for own in losses] == ([1, 3, 2] if match == "none" else [1, 2, 2])
    concept(target, parts, prepared, losses)
