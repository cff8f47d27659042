"""Lengths that are known without making sequences, beside those of the sequences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from families import FAMILY_NAMES, tiny

from laavit.backbones import Backbone, PromptSettings
from laavit.data.aligned import AlignedDataset
from laavit.data.lengths import estimated
from laavit.latents import LatentLayout, latent_tokens
from laavit.structures import Role, Sample


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_estimates_are_close(family: str, samples: list[Sample], tmp_path: Path) -> None:
    """Of samples with one image, and of one with two."""
    backbone = Backbone.load(str(tiny(family, tmp_path / family)))
    backbone.tokenizer.add_tokens(latent_tokens(4), special_tokens=True)
    builder = backbone.builder(PromptSettings(system="Look.", suffix=" Be short."), LatentLayout(4, 2))
    items = [builder.encode(sample, sample.answer) for sample in samples]
    found = estimated(samples, builder, range(len(samples)))
    lengths = np.array([len(item.input_ids) for item in items])
    near = {"rel": 0.15} if family == "idefics3" else {"abs": 2}  # its tiny tokenizer cuts a tile's marker into many
    assert found.sum(1)[:2].tolist() == pytest.approx(lengths[:2].tolist(), **near)
    if family != "llava_onevision":  # which cuts up no image of several
        assert found.sum(1)[2] == pytest.approx(lengths[2], rel=0.2)
    stops = [max(span.end for span in item.spans) for item in items]
    assert found[:2, 0].tolist() == pytest.approx(stops[:2], **near)
    last = builder.prompt_of(samples[0])
    assert int((last.roles == Role.IMAGE).sum()) <= found[0, 0]


def test_questions_before_images_share_nothing(tiny_folder: Path, samples: list[Sample]) -> None:
    builder = Backbone.load(str(tiny_folder)).builder(PromptSettings(order="question_first"))
    dataset = AlignedDataset(samples, builder)
    found = dataset.lengths([1, 0])
    assert found[:, 0].tolist() == [0, 0]
    lengths = [len(dataset[place][0].input_ids) for place in (1, 0)]
    assert found[:, 1].tolist() == pytest.approx(lengths, abs=2)
    assert dataset.lengths([]).shape == (0, 2)
