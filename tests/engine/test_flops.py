"""FLOPs: against a count by hand, for every kind of pass, on models that are frozen, adapted, sharded, checkpointed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import tiny
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from laavit.backbones import Backbone, PromptSettings, collate
from laavit.engine.flops import BatchShape, StepFlops, step_flops
from laavit.engine.strategies import enable_gradient_checkpointing
from laavit.model import LaViT
from laavit.recipe import Recipe
from laavit.structures import Sample
from laavit.students import HFStudent


def model_of(folder: Path, **arguments: object) -> LaViT:
    student = HFStudent(str(folder), **arguments)  # type: ignore[arg-type]
    student.setup(None, torch.Generator())
    return LaViT(student)


def products(model: LaViT) -> int:
    """Weights of the decoder's layers that are factors of a matrix product."""
    decoder = model.student.backbone.family.decoder(model.student.model)
    return sum(p.numel() for p in decoder.layers.parameters() if p.ndim == 2)


def test_a_decoder_is_counted_as_by_hand(tiny_folder: Path) -> None:
    """2 N a position forward, and twice that back; 4 D S² a layer forward (q k and p v), and 10 D S² back."""
    model = model_of(tiny_folder)
    flops, weights = StepFlops.of(model), products(model)
    assert flops.position == 6 * weights
    assert flops.pair == pytest.approx((4 + 10) * 32 * 3)  # width 32, 3 layers
    vocabulary = model.student.model.get_input_embeddings().weight.shape[0]
    assert flops.logit == 6 * 32 * vocabulary
    shape = BatchShape([(10, 10), (4, 14)], labels=3)
    assert step_flops(model, shape) == pytest.approx(14 * 6 * weights + 14 * 96 * (100 + 56) + 3 * 192 * vocabulary)


def test_what_is_frozen_has_no_gradient_of_its_weights(tiny_folder: Path) -> None:
    frozen = StepFlops.of(model_of(tiny_folder, freeze=["vision", "decoder"]))
    whole = StepFlops.of(model_of(tiny_folder))
    assert frozen.position == whole.position * 2 / 3  # forward and the gradient of what comes in
    adapted = StepFlops.of(model_of(tiny_folder, lora={"rank": 4}))
    assert frozen.position < adapted.position < whole.position


def test_checkpointing_and_sharding_change_nothing(tiny_folder: Path, processes: None) -> None:
    """What is computed again is not counted; of a shard the whole is. The model itself stays as it is."""
    plain, model = StepFlops.of(model_of(tiny_folder)), model_of(tiny_folder)
    enable_gradient_checkpointing(model)
    for layer in model.student.backbone.family.decoder(model.student.model).layers:
        fully_shard(layer)
    fully_shard(model)
    assert vars(StepFlops.of(model)) == vars(plain)
    assert any(p.to_local().shape != p.shape for p in model.parameters())  # type: ignore[attr-defined]
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.fixture
def processes() -> Iterator[None]:
    """One process that takes itself for the first of four."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "gemma3"])
def test_batches_of_families(family: str, tmp_path: Path, pictures: list[Path]) -> None:
    """Padding counts nothing, shared beginnings once, cached features need no tower."""
    model = model_of(tiny(family, tmp_path / "model"))
    backbone: Backbone = model.student.backbone
    builder = backbone.builder(PromptSettings(system=""))
    samples = [Sample(str(i), (pictures[0],), "What?" + " is" * (3 * i), "blue") for i in range(2)]
    items = [builder.encode(sample, sample.answer) for sample in samples]
    one, two = (collate(group, backbone.family, backbone.tokenizer.pad_token_id) for group in (items[:1], items))
    alone, both = BatchShape.of(one), BatchShape.of(two)
    assert both.passes[0] == alone.passes[0] and both.passes[1][0] > alone.passes[0][0]
    tokens = sum(span.tile.cells for span in items[0].spans)
    assert both.image_tokens == 2 * tokens and both.labels == sum(int((i.labels >= 0).sum()) for i in items)
    assert step_flops(model, one) > step_flops(model, BatchShape(alone.passes, alone.labels))
    shared = collate(items, backbone.family, backbone.tokenizer.pad_token_id, share=True)
    assert shared.shared is not None
    stop, found = int(shared.shared.stops[0]), BatchShape.of(shared)
    assert found.passes[0] == (stop, stop) and found.image_tokens == tokens
    assert [seen for _, seen in found.passes[1:]] == [seen for _, seen in both.passes]
    assert sum(new for new, _ in found.passes) == sum(new for new, _ in both.passes) - stop
    shared.features = []
    assert BatchShape.of(shared).image_tokens == 0


def test_a_tower_that_learns_costs_three_times_as_much(tiny_folder: Path, pictures: list[Path]) -> None:
    found = []
    for frozen in (["vision"], []):
        model = model_of(tiny_folder, freeze=frozen)
        backbone = model.student.backbone
        item = backbone.builder(PromptSettings()).encode(Sample("a", (pictures[0],), "What?", "blue"), "blue")
        found.append(StepFlops.of(model, collate([item], backbone.family, 0).vision).image_token)
    assert 2.5 * found[0] < found[1] < 3.5 * found[0]


def test_a_recipe_is_counted_without_weights(tiny_folder: Path) -> None:
    recipe = Recipe({"student": {"name": "hf", "path": str(tiny_folder)}})
    shape = BatchShape([(20, 20)], labels=2)
    assert step_flops(recipe, shape) == step_flops(model_of(tiny_folder), shape)
