"""The model class with every family: the prompts of training, and a batch that answers as its prompts do alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILY_NAMES, tiny
from PIL import Image

from laavit.backbones import Backbone, PromptSettings
from laavit.evaluation.bridge import Laavit, Settings
from laavit.structures import Sample

SETTINGS = Settings(max_new_tokens=6, until=())


@pytest.fixture(params=FAMILY_NAMES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny(request.param, tmp_path / request.param)


@pytest.fixture
def asked(samples: list[Sample], pictures: list[Path]) -> list[Sample]:
    """One image, two images, a wide one."""
    return [samples[0], samples[2], Sample("d", (pictures[1],), "How many circles are left of it?", "no")]


def chat(sample: Sample) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": Image.open(path).convert("RGB")} for path in sample.images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": sample.question}]}]


def test_prompts_are_those_of_training(folder: Path, asked: list[Sample]) -> None:
    """Token by token, and the same pixels: the first token once, several images cut up as in training."""
    bridge, backbone = Laavit(str(folder), system="Look closely."), Backbone.load(str(folder))
    builder = backbone.builder(PromptSettings(system="Look closely."))
    for sample in asked:
        prompt, found = builder.prompt_of(sample), bridge.encode([chat(sample)])
        assert found["input_ids"][0].tolist() == prompt.input_ids.tolist()
        seen, wanted = (vision["pixel_values"] for vision in (found, prompt.vision))
        assert torch.equal(seen[seen != 0], wanted[wanted != 0])  # Idefics pads an image's missing tiles with zeros


def test_a_batch_answers_as_its_prompts_alone(folder: Path, asked: list[Sample]) -> None:
    """Left-padded, with unequal numbers of images and a question without one."""
    bridge = Laavit(str(folder))
    blind = [{"role": "user", "content": [{"type": "text", "text": "yes or no?"}]}]
    chats = [*map(chat, asked), blind]
    alone = [bridge.answer([one], SETTINGS)[0].text for one in chats]
    assert [one.text for one in bridge.answer(chats, SETTINGS)] == alone and len(set(alone)) > 2
