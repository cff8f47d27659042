"""A map of boxes for each hop: which latent and which layer follows which, written out over eager maps in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from laavit.backbones.chat import PromptSettings
from laavit.data.aligned import AlignedDataset
from laavit.model import LaViT
from laavit.registry import UserError
from laavit.structures import Batch, Box, Role, Sample
from laavit.targets import BoxTarget
from laavit.targets.base import stack
from laavit.targets.steps import hop_boxes, ordered
from laavit.traces.grids import sample_mask
from tests.targets.test_trajectory_steps import kl, row_of

BOXES = (Box(0.0, 0.0, 0.5, 0.5), Box(0.5, 0.0, 1.0, 0.5), Box(0.25, 0.5, 0.75, 1.0), Box(0.0, 0.5, 0.25, 1.0))
#: three hops, one of two boxes; one hop without saying so; two hops, the first box a second time
HOPS: list[Any] = [[[2], [0, 3], [1]], None, [[1], [0]]]


@pytest.fixture
def hopping(samples: list[Sample]) -> list[Sample]:
    a, b, c = samples
    return [
        replace(a, boxes=BOXES, meta={"hops": HOPS[0]}),
        replace(b, boxes=BOXES[2:3]),
        replace(c, boxes=BOXES[:2], meta={"hops": HOPS[2]}),
    ]


def plain_maps(sample: Sample, batch: Batch, b: int, order: str = "given") -> list[Tensor]:
    """The maps of a sample's hops in order (the mask has a reference of its own in tests/traces/test_grids.py)."""
    hops = sample.meta.get("hops", [[0]])
    hops = hops[::-1] if order == "reversed" else hops
    masks = [
        sample_mask([sample.boxes[i] for i in hop], [s.tile for s in batch.spans[b]], torch.float64) for hop in hops
    ]
    return [mask / mask.sum() for mask in masks]


def check(lab: Any, samples: list[Sample], target: BoxTarget, expected: Callable[..., Tensor], latents: int) -> None:
    """Value and gradients against ``expected(maps, batch)``, worked out on a twin with eager attention."""
    student = lab.student(latents)
    target.setup(student.backbone.width, student.backbone.depth, student.latents, {})
    model = LaViT(student, None, {"t": target}).double().train()
    items = lab.encode(model, samples)
    batch = lab.batch(lab.model({}, student=student), samples, items=items)
    batch.targets["t"] = stack([target.prepare(item, None) for item in items])
    loss = target(model.observe(batch), batch.roles, batch.targets["t"])
    twin = lab.eager(model)
    found = twin.model(batch.input_ids, position_ids=batch.position_ids, output_attentions=True, **batch.vision)
    plain = expected(found.attentions, batch)
    torch.testing.assert_close(loss, plain, rtol=1e-9, atol=1e-10)
    loss.backward()
    plain.backward()
    moved = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert len(moved) > 20
    for name, gradient in moved.items():
        torch.testing.assert_close(model.student.model.get_parameter(name).grad, gradient, rtol=1e-6, atol=1e-10)


def queries(batch: Batch, b: int, role: Role) -> list[int]:
    return (batch.roles[b] == role).nonzero().flatten().tolist()


@pytest.mark.parametrize(("latents", "order"), [(4, "given"), (2, "given"), (4, "reversed")])
def test_each_latent_follows_its_own_hop(lab: Any, hopping: list[Sample], latents: int, order: str) -> None:
    def expected(maps: Sequence[Tensor], batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for b, sample in enumerate(hopping):
            hops = plain_maps(sample, batch, b, order)
            for j, query in enumerate(queries(batch, b, Role.LATENT)):
                total = total + kl(hops[int(j * len(hops) / latents)], row_of(maps, batch, b, query))
        return total / len(hopping)

    check(lab, hopping, BoxTarget(steps="steps", order=order), expected, latents)


@pytest.mark.parametrize(("rows", "role", "latents"), [("latents", Role.LATENT, 4), ("answer", Role.ANSWER, 0)])
def test_each_layer_follows_its_own_hop(lab: Any, hopping: list[Sample], rows: str, role: Role, latents: int) -> None:
    def expected(maps: Sequence[Tensor], batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for b, sample in enumerate(hopping):
            hops = plain_maps(sample, batch, b)
            for layer in range(3):
                for query in queries(batch, b, role):
                    hop = hops[int(layer * len(hops) / 3)]
                    total = total + kl(hop, row_of([maps[layer]], batch, b, query)) / 3
        return total / len(hopping)

    check(lab, hopping, BoxTarget(steps="layers", rows=(rows,)), expected, latents)


def test_each_latent_follows_its_hop_in_the_layers_of_that_hop(lab: Any, hopping: list[Sample]) -> None:
    followed = []

    def expected(maps: Sequence[Tensor], batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for b, sample in enumerate(hopping):
            hops = plain_maps(sample, batch, b)
            for place, layer in enumerate((0, 2)):
                for j, query in enumerate(queries(batch, b, Role.LATENT)):
                    hop = int(place * len(hops) / 2)
                    if hop == int(j * len(hops) / 4):
                        followed.append((b, layer, j))
                        total = total + kl(hops[hop], row_of([maps[layer]], batch, b, query)) / 2
        return total / len(hopping)

    check(lab, hopping, BoxTarget(steps="steps_by_layer", layers=(0, -1)), expected, 4)
    wanted = {0: {(0, 0), (0, 1), (2, 2)}, 2: {(0, 0), (0, 1), (2, 2), (2, 3)}}
    assert {(layer, j) for b, layer, j in followed if b == 0} == wanted[0]
    assert {(layer, j) for b, layer, j in followed if b == 2} == wanted[2]


def test_the_last_hop_alone(lab: Any, hopping: list[Sample]) -> None:
    def expected(maps: Sequence[Tensor], batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for b, sample in enumerate(hopping):
            rows = [row_of(maps, batch, b, query) for query in queries(batch, b, Role.ANSWER)]
            total = total + sum(kl(plain_maps(sample, batch, b)[-1], row) for row in rows) / len(rows)
        return total / len(hopping)

    check(lab, hopping, BoxTarget(steps="final", rows=("answer",), reduction="mean"), expected, 0)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_shuffled_order_is_another_one_of_the_sample_s_own(count: int) -> None:
    steps = list(range(count))
    found = [tuple(ordered(steps, "shuffled", 0, f"sample {i}")) for i in range(60)]
    assert all(sorted(each) == steps and list(each) != steps for each in found)
    assert len(set(found)) > (1 if count > 2 else 0) and found[0] == tuple(ordered(steps, "shuffled", 0, "sample 0"))
    assert ordered([7], "shuffled", 0, "a") == [7] and ordered(steps, "given", 0, "a") == steps


@pytest.mark.parametrize("hops", [[[4]], [[]], [], [0], "0", [["0"]], [[True]], [[-1]], {"0": 1}])
def test_hops_that_do_not_fit_the_boxes_are_named(hopping: list[Sample], hops: Any) -> None:
    with pytest.raises(UserError, match=r"sample 'a': 'hops' is .*; allowed: lists of places in its 4 boxes, from 0"):
        hop_boxes(replace(hopping[0], meta={"hops": hops}))


def test_boxes_without_an_order_stop_before_the_first_step(hopping: list[Sample]) -> None:
    without = [hopping[0], replace(hopping[2], meta={})]
    builder: Any = None
    with pytest.raises(UserError, match=r"targets\.t: sample 'c' has 2 boxes and does not say in which order"):
        AlignedDataset(without, builder, {"t": BoxTarget(steps="final")})
    AlignedDataset(without, builder, {"t": BoxTarget()})
    with pytest.raises(UserError, match="sample 'c' has no box"):
        hop_boxes(replace(hopping[2], boxes=()))


def test_a_control_s_boxes_bring_their_own_order(lab: Any, samples: list[Sample]) -> None:
    """Another sample's boxes are read in the order that the other sample says."""
    pair = [
        replace(samples[0], boxes=BOXES[:1]),
        replace(samples[1], boxes=BOXES[:3], meta={"hops": [[2], [1], [0]]}),
    ]
    model = lab.model({})
    target = BoxTarget(steps="steps", control="shuffled")
    target.setup(32, 3, 4, {})
    data = AlignedDataset(pair, model.student.builder(PromptSettings(system="You look.")), {"t": target})
    first, second = (data[place][1]["t"]["gaze"].T for place in range(2))
    assert len(first.unique(dim=0)) == 3 and len(second.unique(dim=0)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": "step"}, "did you mean 'steps'"),
        ({"steps": "steps", "order": "revers"}, "did you mean 'reversed'"),
        ({"steps": "steps", "rows": ("answer",)}, "rows is 'latents', got answer"),
        ({"steps": "steps_by_layer", "rows": ("latents", "answer")}, "rows is 'latents', got latents, answer"),
        ({"steps": "final", "order": "reversed"}, "order: with steps 'final' all rows follow one map"),
        ({"steps": "layers", "control": "uniform"}, "a uniform map has no hops"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BoxTarget(**arguments)
