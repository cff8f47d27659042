"""Boxes as gaze: Eq. 7 with the share of each cell inside the boxes, written out over eager maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from laavit.data.aligned import AlignedDataset
from laavit.registry import UserError
from laavit.structures import Box, Role, Sample, Span
from laavit.targets import BoxTarget


def plain_share(boxes: Sequence[Box], spans: Sequence[Span]) -> Tensor:
    """The covered share of each cell, counted on a grid of 60 x 60 points a cell, scaled to sum 1."""
    shares, points = [], (torch.arange(60).double() + 0.5) / 60
    for span in spans:
        x1, y1, x2, y2 = span.tile.region
        for row in range(span.tile.height):
            for column in range(span.tile.width):
                ys = y1 + (row + points) / span.tile.height * (y2 - y1)
                xs = x1 + (column + points) / span.tile.width * (x2 - x1)
                inside = torch.zeros(60, 60, dtype=torch.bool)
                for box in boxes:
                    if box.image == span.tile.image:
                        inside |= ((ys > box.y1) & (ys < box.y2))[:, None] & ((xs > box.x1) & (xs < box.x2))
                shares.append(inside.double().mean())
    return torch.stack(shares) / sum(shares)


@pytest.fixture
def boxed(samples: list[Sample]) -> list[Sample]:
    """Edges on the points' raster; two boxes that overlap; one on the second image alone."""
    a, b, c = samples
    return [
        replace(a, boxes=(Box(0.25, 0.0, 0.75, 0.5),)),
        replace(b, boxes=(Box(0.0, 0.0, 0.5, 0.5), Box(0.25, 0.25, 0.75, 1.0))),
        replace(c, boxes=(Box(0.5, 0.5, 1.0, 1.0, 1),)),
    ]


@pytest.mark.parametrize(("rows", "role"), [(("latents",), Role.LATENT), (("answer",), Role.ANSWER)])
def test_box_target_equals_equation_7(lab: Any, boxed: list[Sample], rows: tuple[str, ...], role: Role) -> None:
    model = lab.model({"box": BoxTarget(rows=rows)})
    batch = lab.batch(model, boxed)
    loss = model.named_targets["box"](model.observe(batch), batch.roles, batch.targets["box"])
    twin = lab.eager(model)
    found = twin.model(batch.input_ids, position_ids=batch.position_ids, output_attentions=True, **batch.vision)
    expected = torch.zeros((), dtype=torch.float64)
    for b, sample in enumerate(boxed):
        target = plain_share(sample.boxes, batch.spans[b])
        image = [place for span in batch.spans[b] for place in range(span.start, span.stop)]
        for query in (batch.roles[b] == role).nonzero().flatten().tolist():
            row = sum(each[b, head, query, image] for each in found.attentions for head in range(each.shape[1]))
            expected = expected + sum(t * (t / s).log() for t, s in zip(target, row / row.sum(), strict=True) if t > 0)
    expected = expected / len(boxed)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-6)  # the raster's resolution
    torch.testing.assert_close(loss.detach(), model(batch)["box"])
    loss.backward()
    expected.backward()
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            got = model.student.model.get_parameter(name).grad
            assert (got - parameter.grad).abs().max() < 1e-2 * parameter.grad.abs().max() + 1e-9, name


def test_a_sample_without_a_box_stops_before_the_first_step(lab: Any, boxed: list[Sample]) -> None:
    none = [boxed[0], replace(boxed[1], boxes=())]
    builder: Any = None
    with pytest.raises(UserError, match=r"targets\.box: 1 of 2 samples have no box, the first is 'b'"):
        AlignedDataset(none, builder, {"box": BoxTarget()})
    AlignedDataset(none, builder, {"box": BoxTarget(control="uniform")})
    (item,) = lab.encode(lab.model({}), [replace(boxed[0], boxes=(Box(0.1, 0.1, 0.2, 0.2, 3),))])
    with pytest.raises(UserError, match="the boxes of sample 'a' cannot be a target: a box is on image 3"):
        BoxTarget().prepare(item, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": ("latent",)}, "did you mean 'latents'"),
        ({"layers": ()}, "names no layer"),
        ({"divergence": "kll"}, "did you mean 'kl'"),
        ({"divergence": "reverse_kl"}, "infinite where the student looks and the target is zero"),
        ({"smoothing": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"control": "blank"}, "allowed"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BoxTarget(**arguments)


def test_setup_refuses_what_the_student_does_not_have() -> None:
    with pytest.raises(UserError, match="the box target reads the rows latents, and this recipe has no latents"):
        BoxTarget().setup(8, 2, 0, {})
    with pytest.raises(UserError, match=r"the student has 2 layers, got \[2\]"):
        BoxTarget(layers=(2,)).setup(8, 2, 4, {})
