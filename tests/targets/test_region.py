"""LVR's region embeddings: MSE to the patches inside the box, written out from the tower's own features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILY_NAMES, tiny
from torch import Tensor

from laavit.data.aligned import AlignedDataset
from laavit.model import LaViT
from laavit.registry import UserError
from laavit.structures import Box, Role, Sample
from laavit.targets import RegionTarget


@pytest.fixture
def boxed(samples: list[Sample]) -> list[Sample]:
    """Grids of 2 x 3, 3 x 4, and 5 x 2 with 2 x 3 cells: four cells, one touched cell, and two on the second image."""
    a, b, c = samples
    return [
        replace(a, boxes=(Box(0.0, 0.0, 2 / 3, 1.0),)),
        replace(b, boxes=(Box(0.3, 0.4, 0.4, 0.5),)),
        replace(c, boxes=(Box(0.0, 0.5, 0.6, 1.0, 1),)),
    ]


#: image tokens inside each sample's boxes by hand, and how much of each is covered
INSIDE = [{0: 1.0, 1: 1.0, 3: 1.0, 4: 1.0}, {5: 1.0}, {13: 1.0, 14: 0.8}]


def patches(model: Any, batch: Any, b: int, item: Any) -> Tensor:
    """The tower's projected features of one sample, by transformers' own function."""
    family = model.student.backbone.family
    return torch.cat([each.detach() for each in family.image_features(model.student.model, item.vision)])


@pytest.mark.parametrize("match", ["order", "mean"])
def test_region_target_is_the_mse_to_the_patches_in_the_box(lab: Any, boxed: list[Sample], match: str) -> None:
    model = lab.model({"region": RegionTarget(match=match)})
    items, batch = lab.encode(model, boxed), lab.batch(model, boxed)
    output = model.observe(batch)
    loss = model.named_targets["region"](output, batch.roles, batch.targets["region"])
    torch.testing.assert_close(loss.detach(), model(batch)["region"])

    twin = lab.eager(model)
    hidden = twin.model(batch.input_ids, position_ids=batch.position_ids, **batch.vision).last_hidden_state
    expected, terms = torch.zeros((), dtype=torch.float64), 0
    for b, inside in enumerate(INSIDE):
        found = patches(model, batch, b, items[b])
        assert len(found) == sum(span.tile.cells for span in batch.spans[b])
        latents = (batch.roles[b] == Role.LATENT).nonzero().flatten().tolist()
        for j, latent in enumerate(latents):
            if match == "order":
                wanted = found[list(inside)[int(j * len(inside) / len(latents))]]
            else:
                wanted = sum(share * found[token] for token, share in inside.items()) / sum(inside.values())
            for value, other in zip(hidden[b, latent], wanted, strict=True):
                expected, terms = expected + (value - other) ** 2, terms + 1
    expected = expected / terms
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    loss.backward()
    expected.backward()
    moved = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert len(moved) > 20
    for name, gradient in moved.items():
        if "visual" not in name:
            torch.testing.assert_close(model.student.model.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-8)


def test_nothing_is_learned_through_the_patches(lab: Any, boxed: list[Sample]) -> None:
    """A tower that learns gets its gradient from the states alone, so the target cannot collapse by it."""
    model = lab.model({"region": RegionTarget()}, student=lab.student(freeze=()))
    batch = lab.batch(model, boxed)
    output = model.observe(batch)
    assert output.embeddings is not None and output.embeddings.requires_grad
    wanted = torch.autograd.grad(
        model.named_targets["region"](
            replace(output, hidden=output.hidden.detach().requires_grad_()), batch.roles, batch.targets["region"]
        ),
        output.embeddings,
        allow_unused=True,
    )
    assert wanted == (None,)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_shows_its_patches(
    family: str, lab: Any, boxed: list[Sample], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """At image positions the decoder reads the tower's features, and no other sample's; the step is alive."""
    student = lab.student(folder=tiny(family, tmp_path_factory.mktemp(family)), dtype="float32")
    target = RegionTarget()
    target.setup(student.backbone.width, student.backbone.depth, student.latents, {})
    model = LaViT(student, None, {"region": target}).train()
    batch = lab.batch(model, boxed)
    output = model.observe(batch)
    assert output.embeddings is not None and output.embeddings.shape == output.hidden.shape
    other = lab.batch(model, [replace(boxed[0], question="Something else?"), *boxed[1:]])
    again = model.observe(other).embeddings
    assert again is not None
    for b in range(3):
        image, place = batch.roles[b] == Role.IMAGE, other.roles[b] == Role.IMAGE
        torch.testing.assert_close(output.embeddings[b][image], again[b][place], rtol=1e-4, atol=1e-5)
    losses = model(batch)
    losses["loss"].backward()
    assert torch.isfinite(losses["region"]) and losses["region"] > 0


def test_no_look_where_no_target_asks(lab: Any, boxed: list[Sample]) -> None:
    model = lab.model()
    assert model.observe(lab.batch(model, boxed)).embeddings is None
    assert not lab.model({"region": RegionTarget()}).student.model.model.language_model._forward_pre_hooks


def test_a_cell_that_a_box_covers_by_less_than_half_is_outside(lab: Any, boxed: list[Sample]) -> None:
    (item,) = lab.encode(lab.model({}), [replace(boxed[0], boxes=(Box(0.0, 0.0, 0.4, 0.5),))])
    target = RegionTarget()
    target.setup(32, 3, 4, {})
    assert set(target.prepare(item, None)["share"].nonzero()[:, 0].tolist()) == {0}  # cell 1 is covered by a fifth


def test_random_patches_are_as_many(lab: Any, boxed: list[Sample]) -> None:
    (item,) = lab.encode(lab.model({}), boxed[:1])
    shares = []
    for control in ("none", "random"):
        target = RegionTarget(control=control)
        target.setup(32, 3, 4, {})
        shares.append(target.prepare(item, None)["share"])
    own, drawn = (share.nonzero()[:, 0].tolist() for share in shares)
    assert own == [0, 1, 3, 4] and len(set(drawn)) == 4 and drawn != own


def test_what_is_refused(lab: Any, boxed: list[Sample]) -> None:
    with pytest.raises(UserError, match="the region target reads the latents' states, and this recipe has no latents"):
        RegionTarget().setup(32, 3, 0, {})
    for arguments, message in (
        ({"match": "means"}, "did you mean 'mean'"),
        ({"loss": "info_nce"}, "loss: got 'info_nce'; .*allowed"),
        ({"control": "uniform"}, "only a map can be uniform"),
    ):
        with pytest.raises(UserError, match=message):
            RegionTarget(**arguments)
    none, builder = [boxed[0], replace(boxed[1], boxes=())], lab.student().builder
    with pytest.raises(UserError, match=r"targets\.region: 1 of 2 samples have no box, the first is 'b'"):
        AlignedDataset(none, builder, {"region": RegionTarget()})
