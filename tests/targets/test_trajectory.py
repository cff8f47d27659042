"""Trajectory alignment against Eq. 7 written out over eager attention maps, in float64, values and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from laavit.registry import UserError
from laavit.structures import Batch, Role, Sample, Tile, Trace
from laavit.targets.trajectory import TrajectoryTarget, trajectory_loss


def plain_target(trace: Trace, grids: Sequence[tuple[int, int]], top_k: int | None) -> Tensor:
    """A_traj: Eq. 3, bilinear to the student's grid (App. C.2), Top-K, a distribution again."""
    low, high = min(trace.gaze.tolist()), max(trace.gaze.tolist())
    scaled = torch.tensor([(value - low) / (high - low + 1e-8) for value in trace.gaze.tolist()], dtype=torch.float64)
    parts, before = [], [(tile.height, tile.width) for tile in trace.tiles]
    for part, old, new in zip(scaled.split([h * w for h, w in before]), before, grids, strict=True):
        image = F.interpolate(part.view(1, 1, *old), size=new, mode="bilinear", align_corners=False, antialias=True)
        share = old[0] * old[1] / (new[0] * new[1]) if len(grids) > 1 else 1.0
        parts.append(image.flatten() * share)
    values = torch.cat(parts)
    if top_k is not None:
        floor = sorted(values.tolist(), reverse=True)[:top_k][-1]
        values = torch.tensor([value if value >= floor else 0.0 for value in values.tolist()], dtype=torch.float64)
    return values / values.sum()


def plain_trajectory(
    maps: Sequence[Tensor], batch: Batch, traces: Sequence[Trace], role: Role, top_k: int | None, mean: bool = False
) -> Tensor:
    """mean over samples of sum_j KL(A_traj || A_student,j), A_student,j averaged over all layers and heads.

    Args:
        maps: [B, H, S, S] a layer.
    """
    total = torch.zeros((), dtype=torch.float64)
    for b, trace in enumerate(traces):
        target = plain_target(trace, [(s.tile.height, s.tile.width) for s in batch.spans[b]], top_k)
        image = [place for span in batch.spans[b] for place in range(span.start, span.stop)]
        queries = [i for i, value in enumerate(batch.roles[b].tolist()) if value == role]
        for query in queries:
            row = sum(each[b, head, query, image] for each in maps for head in range(each.shape[1]))
            row = row / row.sum()
            divergence = sum(t * (t.log() - row[n].log()) for n, t in enumerate(target) if t > 0)
            total = total + divergence / (len(queries) if mean else 1)
    return total / len(traces)


CASES: list[tuple[dict[str, Any], Role]] = [
    ({}, Role.LATENT),
    ({"top_k": None}, Role.LATENT),
    ({"top_k": 2, "layers": (0, -1)}, Role.LATENT),
    ({"rows": ("answer",), "reduction": "mean"}, Role.ANSWER),
]


@pytest.mark.parametrize(("arguments", "role"), CASES)
def test_trajectory_target_equals_equation_7(lab: Any, samples: list[Sample], arguments: dict, role: Role) -> None:
    """Unequal grids, a sample with two images, answers of unequal length, all in one batch."""
    model = lab.model({"trajectory": TrajectoryTarget(**arguments)})
    batch = lab.batch(model, samples)
    assert len({tuple(spans) for spans in batch.spans}) == 3 and len(batch.spans[2]) == 2
    ours = model(batch)["trajectory"]
    output = model.observe(batch)
    loss = model.named_targets["trajectory"](output, batch.roles, batch.targets["trajectory"])
    assert torch.equal(loss.detach(), ours)

    twin = lab.eager(model)
    found = twin.model(batch.input_ids, position_ids=batch.position_ids, output_attentions=True, **batch.vision)
    maps = [found.attentions[layer] for layer in arguments.get("layers", (0, 1, 2))]
    traces = [lab.trace(sample) for sample in samples]
    expected = plain_trajectory(
        maps, batch, traces, role, arguments.get("top_k", 8), arguments.get("reduction") == "mean"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)

    loss.backward()
    expected.backward()
    wanted = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in model.student.model.named_parameters() if p.grad is not None}
    moved = {name for name, gradient in wanted.items() if gradient.abs().max() > 0}
    assert moved <= got.keys() and len(moved) > 20
    for name in got.keys() & wanted.keys():
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-6, atol=1e-10, msg=name)


def test_kl_is_zero_at_its_optimum_and_positive_beside_it() -> None:
    torch.manual_seed(0)
    target = F.normalize(torch.rand(2, 9, dtype=torch.float64) * (torch.rand(2, 9) > 0.4), p=1, dim=-1)
    valid = torch.ones(2, 3, dtype=torch.bool)
    # Any positive scale: attention over image tokens does not sum to 1 either.
    student = target[:, None] * torch.tensor([0.1, 0.7, 1.0])[None, :, None]
    assert trajectory_loss(target, student, valid).item() == pytest.approx(0, abs=1e-12)
    assert trajectory_loss(target, student + 0.01, valid) > 1e-4


def test_gradient_vanishes_at_the_optimum() -> None:
    logits = torch.randn(1, 2, 7, dtype=torch.float64)
    target = logits.softmax(-1)
    student = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(trajectory_loss(target, student.softmax(-1), torch.ones(1, 2).bool()), student)
    assert gradient.abs().max() < 1e-12


def test_each_latent_can_have_a_map_of_its_own_and_padding_counts_for_nothing() -> None:
    torch.manual_seed(0)
    target = torch.rand(2, 3, 5, dtype=torch.float64).softmax(-1)
    student = torch.rand(2, 3, 5, dtype=torch.float64)
    valid = torch.tensor([[True, True, True], [True, False, False]])
    share = student / student.sum(-1, keepdim=True)
    each = (target * (target / share).log()).sum(-1)
    expected = (each[0].sum() + each[1, 0]) / 2
    torch.testing.assert_close(trajectory_loss(target, student, valid), expected)
    torch.testing.assert_close(
        trajectory_loss(target, student, valid, per_row_mean=True), (each[0].mean() + each[1, 0]) / 2
    )


def test_a_sum_over_latents_not_a_mean() -> None:
    target, student = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    one = trajectory_loss(target, student[:, None], torch.ones(1, 1).bool())
    four = trajectory_loss(target, student[:, None].expand(1, 4, 2), torch.ones(1, 4).bool())
    torch.testing.assert_close(four, 4 * one)


def test_prepared_maps_are_distributions_of_k_tokens(lab: Any, samples: list[Sample]) -> None:
    model = lab.model({"trajectory": TrajectoryTarget(top_k=3)})
    for item in lab.encode(model, samples):
        gaze = model.named_targets["trajectory"].prepare(item, lab.trace(item.sample))["gaze"]
        assert len(gaze) == sum(span.tile.cells for span in item.spans)
        assert gaze.sum() == pytest.approx(1, abs=1e-12) and (gaze > 0).sum() == 3


def test_a_trace_that_does_not_fit_is_one_sentence(lab: Any, samples: list[Sample]) -> None:
    model = lab.model({"trajectory": TrajectoryTarget()})
    (item,) = lab.encode(model, samples[:1])
    trace = lab.trace(samples[0])
    target = model.named_targets["trajectory"]
    with pytest.raises(UserError, match="sample 'a' cannot be a target: 2 images cannot be resampled to 1"):
        target.prepare(
            item, replace(trace, tiles=(Tile(4, 5), Tile(4, 5, 1)), gaze=torch.cat([trace.gaze, trace.gaze]))
        )
    with pytest.raises(UserError, match=r"sample 'a' cannot be a target: .*zero everywhere"):
        target.prepare(item, replace(trace, gaze=torch.full((20,), 0.3)))
    with pytest.raises(UserError, match="sample 'a' cannot be a target"):
        target.prepare(item, replace(trace, gaze=torch.full((20,), float("nan"))))
    with pytest.raises(UserError, match="sample 'a'"):
        target.prepare(item, replace(trace, gaze=trace.gaze[:-1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "at least 1"),
        ({"rows": ("latent",)}, "did you mean 'latents'"),
        ({"rows": ()}, "names no kind of row"),
        ({"reduction": "max"}, "allowed: mean, sum"),
        ({"weight": -0.1}, "not negative"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrajectoryTarget(**arguments)


def test_setup_refuses_what_the_student_does_not_have() -> None:
    with pytest.raises(UserError, match="has no latents"):
        TrajectoryTarget().setup(8, 2, 0, {})
    with pytest.raises(UserError, match=r"the student has 2 layers, got \[2, -3\]"):
        TrajectoryTarget(layers=(0, 2, -3)).setup(8, 2, 4, {})
    TrajectoryTarget(rows=("header", "answer"), layers=(-1,)).setup(8, 2, 0, {})  # gaze alignment without latents
