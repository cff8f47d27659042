from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from laavit.latents import LearnedLatents
from laavit.microlab.questions import ask
from laavit.microlab.scenes import make_scene, render
from laavit.microlab.tiny import VOCABULARY, Sizes, build_model, build_tokenizer
from tests.microlab.conftest import SIZES


def inputs(processor: Any) -> Any:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is A left of B?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=[render(make_scene(0, 0))], return_tensors="pt")


def test_words_and_answers_are_single_tokens(processor: Any) -> None:
    tokenizer = processor.tokenizer
    for index in range(100):
        for question in ask(make_scene(5, index)):
            assert len(tokenizer.encode(question.answer)) == 1
            assert len(tokenizer.encode(question.text)) <= len(question.text.split()) + 2


@pytest.mark.parametrize("text", ["Ünïcode ☃ text\n\t!", "<|latent_1|> 123"])
def test_any_text_survives_the_tokenizer(processor: Any, text: str) -> None:
    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


def test_tokenizers_are_the_same_each_time(processor: Any) -> None:
    assert build_tokenizer().get_vocab() == processor.tokenizer.get_vocab()


def test_a_scene_is_36_image_tokens_at_its_own_size(processor: Any) -> None:
    batch = inputs(processor)
    assert batch["image_grid_thw"].tolist() == [[1, 12, 12]]
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 36
    assert processor.decode(batch["input_ids"][0]).startswith("<|im_start|>system\nYou are a helpful assistant.")


def test_a_saved_folder_loads_through_the_auto_classes(model: Any, processor: Any, tmp_path: Path) -> None:
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    other = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    batch = inputs(other)
    assert torch.equal(batch["input_ids"], inputs(processor)["input_ids"])
    assert torch.equal(batch["pixel_values"], inputs(processor)["pixel_values"])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
    assert loaded.generate(**batch, max_new_tokens=3).shape[1] <= batch["input_ids"].shape[1] + 3


def test_latents_fit_into_the_spare_rows(processor: Any) -> None:
    tokenizer = build_tokenizer()
    model = build_model(SIZES, tokenizer, seed=0)
    assert VOCABULARY - len(tokenizer) >= 64
    LearnedLatents(count=16).add_to(model, tokenizer, torch.Generator().manual_seed(0))
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY


def test_weights_depend_on_the_seed_and_signals_keep_their_size(processor: Any) -> None:
    first, same, other = (build_model(SIZES, processor.tokenizer, seed) for seed in (0, 0, 1))
    pairs = list(zip(first.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)
    assert first.lm_head.weight is first.model.language_model.embed_tokens.weight
    with torch.no_grad():
        features = first.model.get_image_features(*(inputs(processor)[k] for k in ("pixel_values", "image_grid_thw")))
    assert 0.05 < float(features.pooler_output[0].std()) < 5
    assert np.isfinite(features.pooler_output[0].numpy()).all()


def test_building_leaves_the_global_generator_alone(processor: Any) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    build_model(Sizes(text_width=48, text_layers=1, vision_layers=1), processor.tokenizer, seed=9)
    assert torch.equal(torch.rand(1), wanted)
