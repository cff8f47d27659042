"""Trajectory alignment against Eq. 7 written out over eager attention maps, in float64, values and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from laavit.model import LaViT
from laavit.recipe import Recipe
from laavit.registry import UserError
from laavit.structures import Batch, Role, Sample, Span, Step, Tile, Trace
from laavit.targets.base import stack
from laavit.targets.steps import step_of_latent
from laavit.targets.trajectory import TrajectoryTarget, trajectory_loss
from laavit.traces.gaze import normalise, top_k
from laavit.traces.grids import resample


def overlap(one: Sequence[float], two: Sequence[float]) -> float:
    """Area in which two rectangles x1, y1, x2, y2 overlap."""
    wide, high = (min(one[i + 2], two[i + 2]) - max(one[i], two[i]) for i in (0, 1))
    return max(wide, 0.0) * max(high, 0.0)


def rectangles(tile: Tile) -> list[list[float]]:
    """The cells of a tile as parts of the image."""
    x1, y1, x2, y2 = tile.region
    xs = [x1 + (x2 - x1) * j / tile.width for j in range(tile.width + 1)]
    ys = [y1 + (y2 - y1) * i / tile.height for i in range(tile.height + 1)]
    return [[xs[j], ys[i], xs[j + 1], ys[i + 1]] for i in range(tile.height) for j in range(tile.width)]


def plain_target(
    trace: Trace, grids: Sequence[tuple[int, int]], top_k: int | None, gaze: Tensor | None = None
) -> Tensor:
    """A_traj on whole images: Eq. 3, to the student's grid (bilinear, App. C.2; by area from tiles), Top-K, a share."""
    gaze = trace.gaze if gaze is None else gaze
    low, high = min(gaze.tolist()), max(gaze.tolist())
    scaled = torch.tensor([(value - low) / (high - low + 1e-8) for value in gaze.tolist()], dtype=torch.float64)
    parts = scaled.split([tile.cells for tile in trace.tiles])
    images = []
    for number, new in enumerate(grids):
        own = [(part, tile) for part, tile in zip(parts, trace.tiles, strict=True) if tile.image == number]
        if len(own) == 1:
            part = own[0][0].view(1, 1, own[0][1].height, own[0][1].width)
            image = F.interpolate(part, size=new, mode="bilinear", align_corners=False, antialias=True).flatten()
        else:
            image = torch.zeros(new[0] * new[1], dtype=torch.float64)
            for part, tile in own:
                for value, cell in zip(part, rectangles(tile), strict=True):
                    shares = [overlap(cell, other) / overlap(cell, cell) for other in rectangles(Tile(*new))]
                    image += value * torch.tensor(shares, dtype=torch.float64)
        mass = sum(float(part.sum()) for part, _ in own)  # every image keeps its own
        images.append(image * (mass / image.sum()) if len(trace.tiles) > 1 else image)
    values = torch.cat(images)
    if top_k is not None:
        floor = sorted(values.tolist(), reverse=True)[:top_k][-1]
        values = torch.tensor([value if value >= floor else 0.0 for value in values.tolist()], dtype=torch.float64)
    return values / values.sum()


def plain_trajectory(
    maps: Sequence[Tensor],
    batch: Batch,
    traces: Sequence[Trace],
    role: Role,
    top_k: int | None,
    mean: bool = False,
    steps: bool = False,
) -> Tensor:
    """mean over samples of sum_j KL(A_traj,j || A_student,j), A_student,j averaged over all layers and heads.

    Args:
        maps: [B, H, S, S] a layer. steps: the j-th row follows step floor(j T / K), else all the aggregate.
    """
    total = torch.zeros((), dtype=torch.float64)
    for b, trace in enumerate(traces):
        grids = [(s.tile.height, s.tile.width) for s in batch.spans[b]]
        image = [place for span in batch.spans[b] for place in range(span.start, span.stop)]
        queries = [i for i, value in enumerate(batch.roles[b].tolist()) if value == role]
        for j, query in enumerate(queries):
            step = trace.steps[int(j * len(trace.steps) / len(queries))].gaze if steps else None
            target = plain_target(trace, grids, top_k, step)
            row = sum(each[b, head, query, image] for each in maps for head in range(each.shape[1]))
            row = row / row.sum()
            divergence = sum(t * (t.log() - row[n].log()) for n, t in enumerate(target) if t > 0)
            total = total + divergence / (len(queries) if mean else 1)
    return total / len(traces)


def assert_equal_to_equation_7(lab: Any, model: Any, batch: Batch, expected: Any, layers: Sequence[int]) -> None:
    """Value and gradients of our loss and of ``expected(maps)``, worked out on a twin with eager attention."""
    output = model.observe(batch)
    loss = model.named_targets["trajectory"](output, batch.roles, batch.targets["trajectory"])
    twin = lab.eager(model)
    found = twin.model(batch.input_ids, position_ids=batch.position_ids, output_attentions=True, **batch.vision)
    plain = expected([found.attentions[layer] for layer in layers])
    torch.testing.assert_close(loss, plain, rtol=1e-9, atol=1e-10)
    loss.backward()
    plain.backward()
    wanted = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in model.student.model.named_parameters() if p.grad is not None}
    moved = {name for name, gradient in wanted.items() if gradient.abs().max() > 0}
    assert moved <= got.keys() and len(moved) > 20
    for name in got.keys() & wanted.keys():
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-6, atol=1e-10, msg=name)


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
    traces = [lab.trace(sample) for sample in samples]
    top_k, mean = arguments.get("top_k", 8), arguments.get("reduction") == "mean"
    layers = arguments.get("layers", (0, 1, 2))

    def expected(maps: list[Tensor]) -> Tensor:
        return plain_trajectory(maps, batch, traces, role, top_k, mean)

    output = model.observe(batch)
    loss = model.named_targets["trajectory"](output, batch.roles, batch.targets["trajectory"])
    assert torch.equal(loss.detach(), model(batch)["trajectory"])
    assert_equal_to_equation_7(lab, model, batch, expected, layers)


def stepped(trace: Trace, count: int) -> Trace:
    """A trace with ``count`` steps of random maps."""
    generator = torch.Generator().manual_seed(count + len(trace.sample_id))
    maps = torch.rand(count, len(trace.gaze), generator=generator, dtype=torch.float64).square()
    return replace(trace, steps=tuple(Step(f"word {t}", "object", gaze) for t, gaze in enumerate(maps)))


def cut_up(trace: Trace) -> Trace:
    """The same maps as if the teacher had seen each image in 1 x 2 crops of 2 x 2 tokens and a 3 x 4 thumbnail."""
    halves = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    tiles: list[Tile] = []
    for image in range(len({tile.image for tile in trace.tiles})):
        tiles += [*(Tile(2, 2, image, half) for half in halves), Tile(3, 4, image)]
    assert sum(tile.cells for tile in tiles) == len(trace.gaze)
    return replace(trace, tiles=tuple(tiles))


STEPPED = {"width": 24, "settings": {"steps": "word", "normalisation": "none"}}


@pytest.mark.parametrize("counts", [(4, 4, 4), (1, 3, 7)])
@pytest.mark.parametrize("tiled", [False, True])
def test_steps_are_equation_7_s_own_map_for_each_latent(lab: Any, samples: list, counts: tuple, tiled: bool) -> None:
    """K = 4 latents: as many steps one to one; one, three and seven steps in a batch by floor(j T / K)."""
    target, student = TrajectoryTarget(steps="steps", top_k=5), lab.student()
    target.setup(student.backbone.width, student.backbone.depth, student.latents, STEPPED)
    model = LaViT(student, None, {"trajectory": target}).train()
    batch, items = lab.batch(lab.model({}, student=student), samples), lab.encode(model, samples)
    traces = [stepped(lab.trace(sample), count) for sample, count in zip(samples, counts, strict=True)]
    traces = [cut_up(trace) for trace in traces] if tiled else traces
    prepared = [target.prepare(item, trace) for item, trace in zip(items, traces, strict=True)]
    assert [tuple(each["gaze"].shape) for each in prepared] == [
        (sum(span.tile.cells for span in item.spans), 4) for item in items
    ]
    batch.targets["trajectory"] = stack(prepared)

    def expected(maps: list[Tensor]) -> Tensor:
        return plain_trajectory(maps, batch, traces, Role.LATENT, 5, steps=True)

    assert_equal_to_equation_7(lab, model, batch, expected, (0, 1, 2))


def test_a_teacher_of_tiles_equals_equation_7(lab: Any, samples: list[Sample]) -> None:
    """Crops and a thumbnail on the teacher's side, whole images on the student's."""
    model = lab.model({"trajectory": TrajectoryTarget()})
    batch, items = lab.batch(model, samples), lab.encode(model, samples)
    traces = [cut_up(lab.trace(sample)) for sample in samples]
    target = model.named_targets["trajectory"]
    batch.targets["trajectory"] = stack([target.prepare(i, t) for i, t in zip(items, traces, strict=True)])

    def expected(maps: list[Tensor]) -> Tensor:
        return plain_trajectory(maps, batch, traces, Role.LATENT, 8)

    assert_equal_to_equation_7(lab, model, batch, expected, (0, 1, 2))


def test_a_student_of_tiles(lab: Any, samples: list[Sample]) -> None:
    """The student's tiles decide the target's shape and where its mass goes; both of one tiling are the identity."""
    model = lab.model({"trajectory": TrajectoryTarget(top_k=None)})
    target, trace = model.named_targets["trajectory"], lab.trace(samples[0])
    (item,) = lab.encode(model, samples[:1])
    crops = cut_up(trace).tiles
    tiled = replace(item, spans=tuple(Span(10 * i, tile) for i, tile in enumerate(crops)))
    left = replace(trace, gaze=torch.tensor([1.0, 0.5, 0, 0, 0] * 4, dtype=torch.float64))
    gaze = target.prepare(tiled, left)["gaze"]
    assert gaze.shape == (20,) and gaze.sum() == pytest.approx(1)
    assert gaze[:4].sum() == pytest.approx(8 / 20) and gaze[4:8].sum() == 0  # shared by tokens: 8 in crops, 12 over all
    same = target.prepare(tiled, cut_up(trace))["gaze"]
    scaled = normalise(trace.gaze)
    torch.testing.assert_close(same, scaled / scaled.sum())


def test_maps_that_are_scaled_already_are_not_scaled_again(lab: Any, samples: list[Sample]) -> None:
    """Whatever the extraction stored, the target is Eq. 3 of it, once."""
    model = lab.model({"trajectory": TrajectoryTarget()})
    (item,) = lab.encode(model, samples[:1])
    trace, found = lab.trace(samples[0]), {}
    stored = {
        "none": trace.gaze,
        "minmax": normalise(trace.gaze, 0.5),  # another epsilon, so that scaling twice would show
        "distribution": trace.gaze / trace.gaze.sum(),
    }
    for name, gaze in stored.items():
        target = TrajectoryTarget()
        target.setup(32, 3, 4, {"settings": {"normalisation": name}})
        found[name] = target.prepare(item, replace(trace, gaze=gaze + (0.1 if name == "minmax" else 0.0)))["gaze"]
    torch.testing.assert_close(found["distribution"], found["none"])
    moved = resample(stored["minmax"] + 0.1, trace.tiles, [span.tile for span in item.spans])
    kept = top_k(moved, 8)
    torch.testing.assert_close(found["minmax"], kept / kept.sum())
    with pytest.raises(UserError, match=r"extract\.normalisation 'softmax'.*allowed: none, rows, distribution, minmax"):
        TrajectoryTarget().setup(32, 3, 4, {"settings": {"normalisation": "softmax"}})


@pytest.mark.parametrize(
    ("steps", "expected"), [(4, [0, 1, 2, 3]), (1, [0, 0, 0, 0]), (3, [0, 0, 1, 2]), (9, [0, 2, 4, 6])]
)
def test_which_step_a_latent_follows(steps: int, expected: list[int]) -> None:
    assert step_of_latent(steps, 4).tolist() == expected


def test_steps_that_are_not_there_are_named() -> None:
    target = TrajectoryTarget(steps="steps")
    with pytest.raises(UserError, match=r"these traces hold none; extract with extract\.steps"):
        target.setup(32, 3, 4, {"width": 24, "settings": {"steps": "none"}})
    with pytest.raises(UserError, match="these traces hold none"):
        target.setup(32, 3, 4, {"width": 24})  # of an extraction before there were steps


def test_a_sample_whose_answer_left_no_step_follows_its_aggregate(lab: Any, samples: list[Sample]) -> None:
    target, whole = TrajectoryTarget(steps="steps"), TrajectoryTarget()
    target.setup(32, 3, 4, STEPPED)
    (item,) = lab.encode(lab.model({}), samples[:1])
    expected = whole.prepare(item, lab.trace(samples[0]))["gaze"]
    torch.testing.assert_close(target.prepare(item, lab.trace(samples[0]))["gaze"], expected[:, None].expand(-1, 4))


def test_the_registered_name_is_the_option() -> None:
    built = Recipe({"student": {"name": "hf", "path": "x"}, "targets": {"t": "trajectory_steps"}}).build("targets.t")
    assert (built.steps, built.top_k, built.rows) == ("steps", 8, ("latents",))


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
        ({"steps": "step"}, "did you mean 'steps'"),
        ({"steps": "steps", "rows": ("latents", "answer")}, "rows is 'latents', got latents, answer"),
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
