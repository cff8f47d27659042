"""Greedy generation: batches, caches of keys and values, cached features, and teacher forcing give the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from laavit.backbones import Backbone, PromptSettings, collate
from laavit.registry import UserError
from laavit.structures import Encoded, Sample

PROMPT = PromptSettings(system="You are a helpful assistant.")


@pytest.fixture(scope="module")
def backbone(lab: Any) -> Backbone:
    backbone = lab.student(4).backbone
    backbone.model.eval()
    return backbone


def prompts_of(backbone: Backbone, samples: list[Sample]) -> list[Encoded]:
    return [backbone.builder(PROMPT, 4).prompt_of(sample) for sample in samples]


@torch.no_grad()
def greedy_without_cache(backbone: Backbone, prompt: Encoded, steps: int) -> tuple[list[int], list[Tensor]]:
    """One forward pass over everything so far for every token."""
    item, ids, logits = prompt, [], []
    for _ in range(steps):
        hidden = backbone.forward(collate([item], backbone.family, 0))
        logits.append(backbone.logits(hidden[0, -1]))
        ids.append(int(logits[-1].argmax()))
        if ids[-1] == backbone.tokenizer.eos_token_id:
            break
        item = replace(
            item,
            input_ids=torch.cat([item.input_ids, torch.tensor(ids[-1:])]),
            roles=torch.cat([item.roles, item.roles[-1:]]),
            labels=torch.cat([item.labels, item.labels[-1:]]),
            position_ids=backbone.family.extend(item.position_ids, 1),
        )
    return ids, logits


def test_generation_with_a_cache_equals_generation_without(backbone: Backbone, samples: list[Sample]) -> None:
    for prompt in prompts_of(backbone, samples):
        ids, logits = greedy_without_cache(backbone, prompt, 6)
        types = (prompt.input_ids == backbone.family.image_token_id).int()
        out = backbone.model.generate(
            input_ids=prompt.input_ids[None], mm_token_type_ids=types[None], max_new_tokens=6, do_sample=False,
            return_dict_in_generate=True, output_logits=True, **prompt.vision,
        )  # fmt: skip
        assert out.sequences[0, len(prompt.input_ids) :].tolist() == ids
        for cached, plain in zip(out.logits, logits, strict=True):
            torch.testing.assert_close(cached[0].double(), plain, rtol=0, atol=1e-5)
        text = backbone.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert backbone.generate([prompt], 6) == [text]


def test_a_batch_generates_what_its_samples_generate(backbone: Backbone, samples: list[Sample]) -> None:
    prompts = prompts_of(backbone, samples)
    assert len({len(prompt.input_ids) for prompt in prompts}) == 3
    together = backbone.generate(prompts, 8)
    assert together == [backbone.generate([prompt], 8)[0] for prompt in prompts]
    assert len(set(together)) > 1


def test_cached_features_generate_what_pixels_generate(backbone: Backbone, samples: list[Sample]) -> None:
    prompts = prompts_of(backbone, samples)
    cached = []
    for prompt in prompts:
        features = torch.cat(backbone.family.image_features(backbone.model, prompt.vision))
        cached.append(replace(prompt, features=features.detach()))
    assert backbone.generate(cached, 6) == backbone.generate(prompts, 6)


def test_weights_digest_sees_every_weight(lab: Any) -> None:
    one, two = Backbone.load(str(lab.folder)), Backbone.load(str(lab.folder))
    assert one.weights_digest() == two.weights_digest()
    with torch.no_grad():
        list(two.model.parameters())[-1].view(-1)[-1] += 1e-3
    assert one.weights_digest() != two.weights_digest()


def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for place in (str(tmp_path), str(tmp_path / "nowhere"), "zoo:nobody/nothing"):
        with pytest.raises(UserError, match="no vision-language model can be read from") as caught:
            Backbone.load(place)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="did you mean 'float32'"):
        Backbone.load(str(tmp_path), dtype="float23")
