"""Every family's numbers: recorded rows against whole maps, batches against single samples, features against pixels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILY_NAMES
from torch import Tensor

from laavit.attention import AttentionContext
from laavit.backbones import Backbone, PromptSettings, collate
from laavit.structures import Batch, Encoded, Sample

SYSTEM = PromptSettings(system="You are a helpful assistant.")
Open = Callable[[str], Backbone]
pytestmark = pytest.mark.parametrize("family", FAMILY_NAMES)


def encoded(backbone: Backbone, samples: list[Sample], order: str = "image_first") -> list[Encoded]:
    builder = backbone.builder(replace(SYSTEM, order=order))
    return [builder.encode(sample, sample.answer) for sample in samples]


def batched(backbone: Backbone, items: list[Encoded]) -> Batch:
    return collate(items, backbone.family, backbone.tokenizer.pad_token_id)


@pytest.fixture
def mixed(samples: list[Sample]) -> list[Sample]:
    """Unequal sizes, two images, and none."""
    return [*samples, replace(samples[0], id="d", images=())]


def whole_maps(backbone: Backbone, batch: Batch) -> tuple[Tensor, ...]:
    """Every layer's [B, H, S, S] of transformers' own ``output_attentions``, kept in float64."""
    twin = copy.deepcopy(backbone.model)
    twin.set_attn_implementation({"text_config": "plain", "vision_config": "sdpa"})
    inputs: dict[str, Any] = backbone.family.inputs(batch.vision) | backbone.family.text_inputs(batch.input_ids)
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    return twin.model(input_ids=batch.input_ids, use_cache=False, output_attentions=True, **inputs).attentions


def test_the_decoder_alone_runs_the_attention_function(family: str, open_family: Open) -> None:
    backbone = open_family(family)
    decoder, tower = backbone.family.decoder(backbone.model), backbone.family.vision_tower(backbone.model)

    def runs(module: Any) -> set[str]:
        return {m.config._attn_implementation for m in module.modules() if hasattr(m, "config")}

    assert runs(decoder) == {"laavit"} and runs(tower) == {"sdpa"}


@pytest.mark.parametrize("order", ["image_first", "question_first"])
@torch.no_grad()
def test_recorded_rows_are_those_of_whole_maps(family: str, order: str, open_family: Open, mixed: list[Sample]) -> None:
    """All rows of all layers and heads, in a padded batch of mixed sizes and numbers of images."""
    backbone = open_family(family)
    items = encoded(backbone, mixed, order)
    batch = batched(backbone, items)
    lengths = torch.tensor([len(item.input_ids) for item in items])
    assert len(set(lengths.tolist())) > 2
    everything = torch.arange(batch.input_ids.shape[1]).expand(len(items), -1)
    context = AttentionContext(rows=everything, heads="each")
    backbone.forward(batch, context)
    expected = whole_maps(backbone, batch)
    assert sorted(context.recorded) == list(range(len(expected))) == list(range(backbone.depth))
    for layer, maps in enumerate(expected):
        found = context.recorded[layer]
        assert found.dtype == torch.float64 and found.shape == maps.shape
        for b, length in enumerate(lengths.tolist()):
            torch.testing.assert_close(found[b, :, :length], maps[b, :, :length], rtol=0, atol=1e-7)
            torch.testing.assert_close(found[b, :, :length].sum(-1), torch.ones_like(found[b, :, :length, 0]))
            assert not found[b, :, :length, length:].any()  # nothing looks at the padding
    assert float(expected[-1].std()) > 1e-3  # the maps are not flat


@torch.no_grad()
def test_a_batch_is_its_samples(family: str, open_family: Open, mixed: list[Sample]) -> None:
    backbone = open_family(family)
    items = encoded(backbone, mixed)
    together = backbone.forward(batched(backbone, items))
    assert torch.isfinite(together).all()
    for b, item in enumerate(items):
        alone = backbone.forward(batched(backbone, [item]))[0]
        torch.testing.assert_close(together[b, : len(alone)], alone, rtol=0, atol=1e-6)
    changed = replace(
        items[0], vision={k: v.flip(-1) if v.is_floating_point() else v for k, v in items[0].vision.items()}
    )
    assert not torch.allclose(backbone.forward(batched(backbone, [changed])), together[:1, : len(items[0].input_ids)])


@torch.no_grad()
def test_a_batch_generates_what_its_samples_generate(family: str, open_family: Open, mixed: list[Sample]) -> None:
    backbone = open_family(family)
    builder = backbone.builder(SYSTEM)
    prompts = [builder.prompt_of(sample) for sample in mixed]
    together = backbone.generate(prompts, 8)
    assert together == [backbone.generate([prompt], 8)[0] for prompt in prompts]
    assert len(set(together)) > 2


@torch.no_grad()
def test_generation_continues_the_sequence_it_is_given(family: str, open_family: Open, samples: list[Sample]) -> None:
    """With a cache, and the model's own positions, as without: one forward pass over everything for every token."""
    backbone = open_family(family)
    prompt = backbone.builder(SYSTEM).prompt_of(samples[2])
    item, ids = prompt, list[int]()
    for _ in range(5):
        ids.append(int(backbone.logits(backbone.forward(batched(backbone, [item]))[0, -1]).argmax()))
        if ids[-1] in (*backbone.stops, backbone.family.image_token_id):  # random weights may even write an image
            break
        item = replace(
            item,
            input_ids=torch.cat([item.input_ids, torch.tensor(ids[-1:])]),
            roles=torch.cat([item.roles, item.roles[-1:]]),
            labels=torch.cat([item.labels, item.labels[-1:]]),
            position_ids=backbone.family.extend(item.position_ids, 1),
        )
    assert backbone.generate([prompt], len(ids)) == [backbone.tokenizer.decode(ids, skip_special_tokens=True).strip()]


@torch.no_grad()
def test_features_stand_for_pixels(family: str, open_family: Open, samples: list[Sample]) -> None:
    """Handed over, an image's features give the states and the answers that its pixels give; one tensor an image."""
    backbone = open_family(family)
    if not backbone.family.takes_features:
        pytest.skip("this family takes pixels only")
    items, builder = encoded(backbone, samples), backbone.builder(SYSTEM)
    prompts = [builder.prompt_of(sample) for sample in samples]

    def seen(given: list[Encoded]) -> list[Encoded]:
        vision = backbone.family.batch([item.vision for item in given])
        features = list(backbone.family.image_features(backbone.model, vision))
        assert len(features) == sum(len(item.sample.images) for item in given)
        return [replace(i, features=torch.cat([features.pop(0) for _ in i.sample.images])) for i in given]

    expected = backbone.forward(batched(backbone, items))
    torch.testing.assert_close(backbone.forward(batched(backbone, seen(items))), expected, rtol=0, atol=1e-9)
    bare = [replace(item, vision={k: v for k, v in item.vision.items() if k != "pixel_values"}) for item in seen(items)]
    torch.testing.assert_close(backbone.forward(batched(backbone, bare)), expected, rtol=0, atol=1e-9)
    assert backbone.generate(seen(prompts), 6) == backbone.generate(prompts, 6)


@torch.no_grad()
def test_half_precision_runs_throughout(family: str, folder_of: Callable[[str], Any], samples: list[Sample]) -> None:
    backbone = Backbone.load(str(folder_of(family)), dtype="bfloat16")
    items = encoded(backbone, samples[:2])
    context = AttentionContext(rows=torch.tensor([[30, -1], [30, 31]]))
    hidden = backbone.forward(batched(backbone, items), context)
    assert hidden.dtype == torch.bfloat16 and torch.isfinite(hidden).all()
    assert context.mean_rows().dtype == torch.float32
