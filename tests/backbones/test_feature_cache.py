"""A frozen tower's features kept while training: the same loss and gradient, and each image passes the tower once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from laavit.backbones.base import collate
from laavit.backbones.vision_cache import keep_features
from laavit.gates import ConstantGate
from laavit.model import LaViT
from laavit.registry import UserError
from laavit.structures import Batch, Sample


def gradients(model: LaViT, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(batch)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.trainable_parameters() if p.grad is not None}


def batch_of(lab: Any, model: LaViT, samples: Sequence[Sample], share: bool) -> Batch:
    batch = lab.batch(model, samples)
    if share:
        backbone = model.student.backbone
        shared = collate(lab.encode(model, samples), backbone.family, backbone.tokenizer.pad_token_id, share=True)
        assert shared.shared is not None
        shared.targets, batch = batch.targets, shared
    return batch


@pytest.mark.parametrize("share", [False, True])
def test_the_gradient_is_the_same_and_the_tower_runs_once_an_image(
    lab: Any, samples: list[Sample], share: bool
) -> None:
    asked = [*samples, Sample("d", samples[1].images, "What colour?", "red", samples[1].boxes)]
    plain = lab.model(gate=ConstantGate(0.3))
    cached = copy.deepcopy(plain)
    keep_features(cached.student.backbone, 2**20)
    cache = cached.student.backbone.feature_cache
    runs: list[int] = []
    tower = cached.student.backbone.family.vision_tower(cached.student.model)
    tower.register_forward_hook(lambda *given: runs.append(1))
    expected, grads = gradients(plain, batch_of(lab, plain, asked, share))
    for _ in range(3):
        loss, found = gradients(cached, batch_of(lab, cached, asked, share))
        assert found.keys() == grads.keys()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, grads[name], rtol=1e-9, atol=1e-13)
    assert len(runs) == 1 and cache.misses == 3  # one of the five images is another sample's, too, one is repeated
    assert cache.hits == 3 * (4 if share else 5) - 3


def test_a_small_budget_forgets_and_stays_right(lab: Any, samples: list[Sample]) -> None:
    model = lab.model()
    expected, _ = gradients(model, lab.batch(model, samples))
    keep_features(model.student.backbone, 1)
    cache = model.student.backbone.feature_cache
    for _ in range(2):
        loss, _ = gradients(model, lab.batch(model, samples))
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert cache.misses == 6 and not cache._kept


def test_a_tower_that_learns_is_refused(lab: Any) -> None:
    model = lab.model(student=lab.student(freeze=()))
    with pytest.raises(UserError, match="out of date after a step: visual"):
        keep_features(model.student.backbone, 2**20)
