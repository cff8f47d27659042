"""Every family's sequences: roles, spans and regions, on a tiny model of its own class with its own processor."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILY_NAMES
from PIL import Image
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from laavit.backbones import Backbone, PromptSettings, SequenceBuilder, collate
from laavit.backbones.chat import IGNORED
from laavit.backbones.families import family_of
from laavit.commands.export import exported_template
from laavit.latents import latent_tokens
from laavit.registry import UserError
from laavit.structures import Encoded, Role, Sample, Span

SYSTEM = PromptSettings(system="You are a helpful assistant.")
ORDERS = ("image_first", "question_first")
Open = Callable[[str], Backbone]
pytestmark = pytest.mark.parametrize("family", FAMILY_NAMES)


def words(backbone: Backbone, item: Encoded, role: Role) -> str:
    return backbone.tokenizer.decode(item.input_ids[item.roles == role])


@pytest.mark.parametrize("order", ORDERS)
def test_every_position_has_its_role(family: str, order: str, open_family: Open, samples: list[Sample]) -> None:
    backbone = open_family(family)
    builder = backbone.builder(replace(SYSTEM, order=order))
    for sample in samples:
        prompt, item = builder.prompt_of(sample), builder.encode(sample, sample.answer)
        decode = backbone.tokenizer.decode
        assert words(backbone, item, Role.QUESTION).strip() == sample.question
        positions = (item.roles == Role.QUESTION).nonzero().flatten()
        assert (positions.diff() == 1).all()
        image = (item.roles == Role.IMAGE).nonzero().flatten()
        assert torch.equal(image, torch.cat([span.positions() for span in item.spans]))  # in order, none twice
        assert (item.input_ids[image] == backbone.family.image_token_id).all()
        assert (positions[-1] < image[0]) if order == "question_first" else (positions[0] > image[-1])
        assert [span.tile.image for span in item.spans] == sorted(span.tile.image for span in item.spans)
        assert {span.tile.image for span in item.spans} == set(range(len(sample.images)))
        # The answer as the family's own template writes it, from the header to the token that ends the turn.
        chat = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        chat += [{"role": "assistant", "content": [{"type": "text", "text": sample.answer}]}]
        whole = backbone.processor.apply_chat_template(chat, tokenize=False)
        between, end = backbone.family.answer_frame[0], decode([backbone.family.end_of_turn()])
        turn = decode(item.input_ids[slice(*item.header)]) + between + sample.answer
        turn += end if family != "llava" else ""  # LLaVA-1.5's template ends no turn
        assert "".join(turn.split()) in "".join(whole.split())  # LLaVA-OneVision's own header has two forms of spaces
        assert words(backbone, item, Role.ANSWER) == between + sample.answer + end
        asked = (item.labels != IGNORED).nonzero().flatten()
        assert torch.equal(item.labels[asked], item.input_ids[asked + 1])
        assert torch.equal(item.input_ids[: len(prompt.input_ids)], prompt.input_ids)
        assert item.header[1] == len(prompt.input_ids)


@pytest.mark.parametrize("order", ORDERS)
def test_questions_that_look_like_the_prompt(family: str, order: str, open_family: Open, pictures: list[Path]) -> None:
    backbone = open_family(family)
    builder = backbone.builder(replace(SYSTEM, order=order, suffix=" Answer with one word."))
    for question in ("user", "You are a helpful assistant.", "Assistant: ", "a", " blue ", "\n\nwhat?", "Füße ö 圖 🙂"):
        sample = Sample("q", (pictures[0], pictures[2]), question, "no")
        item = builder.prompt_of(sample)
        found = words(backbone, item, Role.QUESTION)
        assert found.strip() == (question + " Answer with one word.").strip()
        positions = (item.roles == Role.QUESTION).nonzero().flatten()
        image = torch.cat([span.positions() for span in item.spans])
        assert (positions[-1] < image[0]) if order == "question_first" else (positions[0] > image[-1])


def test_a_question_alone(family: str, open_family: Open, samples: list[Sample]) -> None:
    """Without an image nothing is an image, and the words are the same: the teacher without the image."""
    backbone = open_family(family)
    for order in ORDERS:
        builder = backbone.builder(replace(SYSTEM, order=order))
        blind = builder.prompt_of(replace(samples[0], images=()))
        assert blind.spans == () and not (blind.roles == Role.IMAGE).any() and dict(blind.vision) == {}
        assert words(backbone, blind, Role.QUESTION).strip() == samples[0].question
        assert (blind.input_ids != backbone.family.image_token_id).all()


def test_the_first_token_is_written_once(family: str, open_family: Open, samples: list[Sample]) -> None:
    backbone = open_family(family)
    chat = [{"role": "user", "content": [{"type": "text", "text": samples[0].question}]}]
    own = backbone.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    item = backbone.builder(PromptSettings(system="")).prompt_of(replace(samples[0], images=()))
    assert torch.equal(item.input_ids, own["input_ids"][0])


def test_latents_and_an_exported_template(family: str, open_family: Open, samples: list[Sample]) -> None:
    """With latents before the answer, and from the template that an export writes, as without one."""
    processor = copy.deepcopy(open_family(family).processor)
    processor.tokenizer.add_tokens(latent_tokens(3), special_tokens=True)
    config = open_family(family).model.config

    def encoded() -> list[Encoded]:
        builder = SequenceBuilder(processor, family_of(config, processor), SYSTEM, 3)
        return [builder.encode(sample, sample.answer) for sample in samples]

    before = encoded()
    processor.chat_template = exported_template(processor.chat_template, SYSTEM.system, 3)
    for item, again in zip(before, encoded(), strict=True):
        latent = processor.tokenizer.decode(item.input_ids[item.roles == Role.LATENT])
        assert latent == "".join(latent_tokens(3)[:-1])
        assert (item.roles == Role.LATENT).nonzero().flatten()[0] == item.header[1]
        assert torch.equal(again.input_ids, item.input_ids) and torch.equal(again.roles, item.roles)
        assert again.header == item.header and again.spans == item.spans


def test_what_cannot_be_asked_names_the_sample(family: str, open_family: Open, pictures: list[Path]) -> None:
    backbone = open_family(family)
    builder = backbone.builder(SYSTEM)
    for question in ("", "  \n", f"what is {backbone.family.placeholder}?"):
        with pytest.raises(UserError, match=r"sample 'q'"):
            builder.prompt_of(Sample("q", (pictures[0],), question, "no"))
    if family.startswith("qwen"):
        with pytest.raises(UserError, match=r"sample 'q': the processor refuses it: .*aspect ratio") as caught:
            builder.prompt_of(Sample("q", (pictures[0],), "what?", "no"), [Image.new("RGB", (900, 4))])
        assert "\n" not in str(caught.value)


def test_an_answer_that_spells_an_image_is_words(family: str, open_family: Open, samples: list[Sample]) -> None:
    backbone = open_family(family)
    token = backbone.tokenizer.decode([backbone.family.image_token_id])
    prompt = backbone.builder(SYSTEM).prompt_of(samples[0])
    item = backbone.builder(SYSTEM).with_answer(prompt, f"a {token} b")
    assert f"a {token} b" in words(backbone, item, Role.ANSWER)
    image = item.input_ids == backbone.family.image_token_id
    assert int(image.sum()) == int((prompt.input_ids == backbone.family.image_token_id).sum())
    plain = backbone.builder(SYSTEM).with_answer(prompt, "a b")  # and the tokenizer is as it was
    assert words(backbone, plain, Role.ANSWER).endswith(backbone.tokenizer.decode([backbone.family.end_of_turn()]))
    assert torch.equal(backbone.builder(SYSTEM).prompt_of(samples[0]).input_ids, prompt.input_ids)


def test_a_builder_travels_to_a_data_worker(family: str, open_family: Open, samples: list[Sample]) -> None:
    builder = open_family(family).builder(SYSTEM)
    there = pickle.loads(pickle.dumps(builder))  # noqa: S301 - our own
    for sample in samples:
        here, away = builder.prompt_of(sample), there.prompt_of(sample)
        assert torch.equal(here.input_ids, away.input_ids) and here.spans == away.spans
        assert all(torch.equal(here.vision[key], away.vision[key]) for key in here.vision)


def test_another_number_of_image_tokens_is_refused(family: str, open_family: Open, samples: list[Sample]) -> None:
    backbone = open_family(family)
    item = backbone.builder(SYSTEM).prompt_of(samples[1])
    image = item.spans[0].positions()
    for ids in (torch.cat([item.input_ids[: image[1]], item.input_ids[image[1] + 1 :]]), item.input_ids[: image[-1]]):
        with pytest.raises(ValueError, match=r"image tokens|tiles"):
            backbone.family.spans(ids, item.vision)


def test_an_unknown_family_is_one_sentence(family: str, open_family: Open) -> None:
    backbone = open_family(family)
    config = copy.copy(backbone.model.config)
    config.model_type = family + "x"
    with pytest.raises(UserError, match=f"laavit does not know where .* '{family}'"):
        family_of(config, backbone.processor)


def no_attention(module: Any, query: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Patches that do not see each other: a token's input then depends on its own pixels alone."""
    return torch.zeros_like(query).transpose(1, 2).contiguous(), None


AttentionInterface.register("none", no_attention)
AttentionMaskInterface.register("none", sdpa_mask)


@torch.no_grad()
def inputs_at_images(backbone: Backbone, item: Encoded) -> list[Tensor]:
    """What the decoder reads at every span's positions: [cells, D] a span."""
    caught: list[Tensor] = []
    hook = backbone.family.decoder(backbone.model).register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    backbone.forward(collate([item], backbone.family, 0))
    hook.remove()
    return [caught[0][0, span.positions()] for span in item.spans]


def cell_of(span: Span, x: float, y: float, margin: float = 0.2) -> int | None:
    """The cell of a span's tile under a point; None outside the tile. A point near an edge of a cell raises."""
    x1, y1, x2, y2 = span.tile.region
    column, row = (x - x1) / (x2 - x1) * span.tile.width, (y - y1) / (y2 - y1) * span.tile.height
    if not (0 <= column < span.tile.width and 0 <= row < span.tile.height):
        return None
    if any(min(c % 1, 1 - c % 1) < margin for c in (column, row)):
        raise LookupError
    return int(row) * span.tile.width + int(column)


@pytest.mark.parametrize("size", [(96, 96), (64, 128)])
def test_a_patch_of_the_image_is_a_cell_of_its_tiles(family: str, size: tuple[int, int], open_family: Open) -> None:
    """Change a few pixels of one of two images: in each tile over them one token changes most, the one under them."""
    backbone = copy.deepcopy(open_family(family))
    backbone.model.set_attn_implementation({"text_config": "laavit", "vision_config": "none"})
    builder, generator = backbone.builder(SYSTEM), torch.Generator().manual_seed(1)
    width, height = size
    plain = [Image.new("RGB", size, (90, 120, 150)), Image.new("RGB", (64, 64), (90, 120, 150))]
    sample = Sample("s", (Path("0"), Path("1")), "what?", "no")
    item = builder.prompt_of(sample, plain)
    before = inputs_at_images(backbone, item)
    tested = 0
    while tested < 5:
        x, y = torch.rand(2, generator=generator).tolist()
        try:
            cells = [cell_of(span, x, y) if span.tile.image == 0 else None for span in item.spans]
        except LookupError:
            continue
        if all(cell is None for cell in cells):  # the last pixels of an image can lie in no patch of its tower
            continue
        changed = plain[0].copy()
        left, top = round(x * width), round(y * height)
        changed.paste((255, 0, 0), (left - 1, top - 1, left + 1, top + 1))
        after = inputs_at_images(backbone, builder.prompt_of(sample, [changed, plain[1]]))
        moved = [(a - b).norm(dim=-1) for a, b in zip(after, before, strict=True)]
        largest = max(float(m.max()) for m in moved)
        for span, cell, change in zip(item.spans, cells, moved, strict=True):
            if span.tile.image == 1:
                assert float(change.max()) == 0
            elif cell is None:
                assert float(change.max()) < 0.3 * largest
            else:
                assert int(change.argmax()) == cell, (span, x, y)
        tested += 1
