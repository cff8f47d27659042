"""The sequence contract: roles, labels and positions of every token, in one place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from laavit.backbones import Backbone, PromptSettings, collate
from laavit.backbones.chat import IGNORED
from laavit.commands.export import exported_template
from laavit.latents import latent_tokens
from laavit.registry import UserError
from laavit.structures import Role, Sample

SYSTEM = PromptSettings(system="You are a helpful assistant.")


@pytest.fixture(scope="module")
def backbone(lab: Any) -> Backbone:
    return lab.student(4).backbone


@pytest.mark.parametrize("order", ["image_first", "question_first"])
@pytest.mark.parametrize("latents", [0, 4])
def test_every_position_has_its_role(backbone: Backbone, samples: list[Sample], order: str, latents: int) -> None:
    builder = backbone.builder(replace(SYSTEM, order=order), latents)
    decode = backbone.tokenizer.decode
    for sample in samples:
        item = builder.encode(sample, sample.answer)
        pieces = {role: decode(item.input_ids[item.roles == role]) for role in Role}
        assert pieces[Role.QUESTION].strip() == sample.question
        assert pieces[Role.IMAGE] == "<|image_pad|>" * sum(s.tile.cells for s in item.spans)
        assert pieces[Role.LATENT] == "".join(latent_tokens(latents)[:-1])
        assert pieces[Role.ANSWER] == ("<|latent_end|>" if latents else "") + sample.answer + "<|im_end|>"
        assert decode(item.input_ids[slice(*item.header)]) == "<|im_start|>assistant\n"
        asked = (item.labels != IGNORED).nonzero().flatten()
        assert torch.equal(item.labels[asked], item.input_ids[asked + 1])  # shifted: what comes next
        assert decode(item.labels[asked]) == sample.answer + "<|im_end|>"
        assert [(s.tile.height, s.tile.width) for s in item.spans] == [
            (Image.open(path).height // 16, Image.open(path).width // 16) for path in sample.images
        ]


def test_a_prompt_is_the_beginning_of_its_training_sequence(backbone: Backbone, samples: list[Sample]) -> None:
    builder = backbone.builder(SYSTEM, 4)
    for sample in samples:
        prompt, item = builder.prompt_of(sample), builder.encode(sample, sample.answer)
        length = len(prompt.input_ids)
        assert torch.equal(item.input_ids[:length], prompt.input_ids) and (prompt.labels == IGNORED).all()
        assert torch.equal(item.position_ids[:, :length], prompt.position_ids)
        assert backbone.tokenizer.decode(prompt.input_ids[-5:]) == "".join(latent_tokens(4))


def test_positions_are_the_models_own(backbone: Backbone, samples: list[Sample]) -> None:
    """M-RoPE positions of the whole sequence, answer included, as the model works them out by itself."""
    for sample in samples:
        item = backbone.builder(SYSTEM, 4).encode(sample, sample.answer)
        types = (item.input_ids == backbone.family.image_token_id).int()
        expected, _ = backbone.model.model.get_rope_index(
            item.input_ids[None], mm_token_type_ids=types[None], image_grid_thw=item.vision["image_grid_thw"]
        )
        assert torch.equal(item.position_ids, expected[:, 0])


def test_a_question_that_repeats_words_of_the_prompt(backbone: Backbone, pictures: list[Path]) -> None:
    for question in ("user", "You are a helpful assistant.", "assistant\n", "<|im_end|>?", "a", " blue "):
        sample = Sample("q", (pictures[0],), question, "no")
        item = backbone.builder(SYSTEM, 4).encode(sample, "no")
        positions = (item.roles == Role.QUESTION).nonzero().flatten()
        assert question.strip() in backbone.tokenizer.decode(item.input_ids[positions])
        assert positions[0] >= item.spans[0].stop and positions[-1] < item.header[0]
        assert (positions.diff() == 1).all()


def test_a_suffix_belongs_to_the_question_and_no_system_is_possible(backbone: Backbone, samples: list[Sample]) -> None:
    item = backbone.builder(PromptSettings(system="", suffix=" Answer with one word."), 4).prompt_of(samples[0])
    text = backbone.tokenizer.decode(item.input_ids[item.roles == Role.QUESTION])
    assert text.strip() == samples[0].question + " Answer with one word."
    assert "system" not in backbone.tokenizer.decode(item.input_ids)


def test_an_exported_template_gives_the_same_sequences(lab: Any, samples: list[Sample]) -> None:
    backbone = lab.student(4).backbone
    before = [backbone.builder(SYSTEM, 4).encode(sample, sample.answer) for sample in samples]
    backbone.processor.chat_template = exported_template(backbone.processor.chat_template, SYSTEM.system, 4)
    for sample, item in zip(samples, before, strict=True):
        again = backbone.builder(SYSTEM, 4).encode(sample, sample.answer)
        assert torch.equal(again.input_ids, item.input_ids) and torch.equal(again.roles, item.roles)
        assert again.header == item.header


def test_collate_pads_to_the_right(backbone: Backbone, samples: list[Sample]) -> None:
    items = [backbone.builder(SYSTEM, 4).encode(sample, sample.answer) for sample in samples]
    pad = backbone.tokenizer.pad_token_id
    batch = collate(items, backbone.family, pad)
    assert batch.position_ids is not None and batch.position_ids.shape == (3, *batch.input_ids.shape)
    for b, item in enumerate(items):
        length = len(item.input_ids)
        assert torch.equal(batch.input_ids[b, :length], item.input_ids)
        assert torch.equal(batch.position_ids[:, b, :length], item.position_ids)
        assert (batch.input_ids[b, length:] == pad).all() and (batch.labels[b, length:] == IGNORED).all()
        assert (batch.roles[b, length:] == Role.OTHER).all() and batch.spans[b] == item.spans
    assert batch.vision["image_grid_thw"].shape == (4, 3)  # four images in three samples
    mixed = [replace(items[0], features=torch.zeros(6, 32)), items[1]]
    with pytest.raises(ValueError, match="with and without cached"):
        collate(mixed, backbone.family, pad)


def test_latents_that_the_tokenizer_does_not_hold_are_named(lab: Any) -> None:
    with pytest.raises(UserError, match=r"does not hold <\|latent_1\|>.*add the latents"):
        Backbone.load(str(lab.folder)).builder(SYSTEM, 2)
