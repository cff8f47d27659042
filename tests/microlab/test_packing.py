from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from laavit.attention import AttentionContext
from laavit.backbones import Backbone
from laavit.backbones.base import collate
from laavit.backbones.chat import PromptSettings
from laavit.microlab.packing import IGNORED, TOKENS, Packer, Part, box_distribution
from laavit.microlab.questions import QUESTION_KINDS, ask
from laavit.microlab.scenes import make_scene, render
from laavit.microlab.vision import image_features
from laavit.structures import Sample

KINDS = list(QUESTION_KINDS)


@pytest.mark.parametrize("system", ["", "You see."])
def test_packed_questions_equal_plain_sequences(model: Any, processor: Any, tmp_path: Path, system: str) -> None:
    model = model.double().eval()
    scenes = [make_scene(5, index) for index in range(2)]
    packer = Packer(processor, KINDS, system=system)
    packed = packer.pack(scenes)
    backbone = Backbone(model, processor)
    builder = backbone.builder(PromptSettings(system=system))
    with torch.no_grad():
        features = image_features(model, processor, scenes)
        context = AttentionContext(rows=packed.gaze_rows.flatten(1))
        states = packer.hidden(model, features, packed, context)
        gaze = packer.gaze(context.mean_rows(), packed.gaze_rows.shape[-1])
        for i, scene in enumerate(scenes):
            path = tmp_path / f"{i}.png"
            Image.fromarray(render(scene)).save(path)
            samples = [Sample(str(j), (path,), q.text, q.answer) for j, q in enumerate(ask(scene, KINDS))]
            encoded = [builder.encode(sample, sample.answer) for sample in samples]
            batch = collate(encoded, backbone.family, processor.tokenizer.pad_token_id)
            rows = torch.stack([torch.arange(e.header[0], e.header[1] + 2) for e in encoded])
            plain_context = AttentionContext(rows=rows)
            plain = backbone.forward(batch, plain_context)
            own = slice(i, i + 1)
            assert torch.equal(packed.labels[own][packed.labels[own] != IGNORED], batch.labels[batch.labels != IGNORED])
            torch.testing.assert_close(
                states[i][packed.labels[i] != IGNORED], plain[batch.labels != IGNORED], rtol=0, atol=1e-9
            )
            looked = torch.stack(
                [
                    row[:, e.spans[0].start : e.spans[0].stop]
                    for row, e in zip(plain_context.mean_rows(), encoded, strict=True)
                ]
            )
            torch.testing.assert_close(gaze[i], looked / looked.sum(-1, keepdim=True), rtol=0, atol=1e-9)


def test_a_slot_names_its_parts(processor: Any) -> None:
    packer = Packer(processor, KINDS)
    scene = make_scene(5, 0)
    packed = packer.pack([scene])
    slots = packed.input_ids[0, len(packer.prefix) :].view(len(KINDS), -1)
    tokenizer = processor.tokenizer
    for j, question in enumerate(ask(scene, KINDS)):
        assert tokenizer.decode(slots[j][packed.parts[0, j] == Part.QUESTION]) == question.text
        assert tokenizer.decode(slots[j][packed.parts[0, j] == Part.HEADER]) == "<|im_start|>assistant\n"
        assert tokenizer.decode(slots[j][packed.parts[0, j] == Part.ANSWER]) == f"{question.answer}<|im_end|>"
        asked = packed.input_ids[0, packed.gaze_rows[0, j]]
        assert tokenizer.decode(asked) == f"<|im_start|>assistant\n{question.answer}<|im_end|>"
        assert packed.labels[0, packed.first[0, j]] == packed.answers[0, j] == tokenizer.encode(question.answer)[0]


def test_boxes_are_a_distribution_over_exactly_their_cells_tokens() -> None:
    boxes = box_distribution(((32, 64, 64, 96), (64, 0, 96, 32)))
    assert boxes.shape == (TOKENS,)
    assert boxes.nonzero().flatten().tolist() == [4, 5, 10, 11, 26, 27, 32, 33]
    assert torch.allclose(boxes[boxes > 0], torch.tensor(1 / 8))


def test_a_question_too_long_for_its_slot_is_named(processor: Any) -> None:
    with pytest.raises(ValueError, match="a slot has 8 tokens, 'What"):
        Packer(processor, KINDS, width=8).pack([make_scene(5, 0)])


def test_indexing_takes_the_same_scenes_of_every_field(processor: Any) -> None:
    packer = Packer(processor, ["depth"])
    packed = packer.pack([make_scene(5, index) for index in range(4)])
    part = packed[torch.tensor([2, 0])]
    assert len(part) == 2
    assert torch.equal(part.boxes, packed.boxes[[2, 0]]) and torch.equal(part.answers, packed.answers[[2, 0]])
