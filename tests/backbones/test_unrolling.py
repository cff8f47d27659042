"""Latents that are fed back, in every family: passes with kept keys give what whole passes give, and a cache does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILY_NAMES
from torch import Tensor

from laavit.attention import AttentionContext
from laavit.backbones import Backbone, PromptSettings, collate
from laavit.backbones.unrolling import Feedback, vocabulary_rms
from laavit.gates import ConstantGate
from laavit.latents import FeedbackLatents, latent_tokens
from laavit.model import gate_paths
from laavit.structures import Batch, Encoded, Role, Sample
from laavit.students import HFStudent

PROMPT = PromptSettings(system="Look.")
K = 3
pytestmark = pytest.mark.parametrize("family", FAMILY_NAMES)


@pytest.fixture(scope="session")
def fed(folder_of: Callable[[str], Path]) -> Callable[[str], Backbone]:
    """A family's backbone with K latents that are fed back, in float64; treat as read-only."""

    @cache
    def made(family: str) -> Backbone:
        student = HFStudent(str(folder_of(family)), "float64")
        student.setup(FeedbackLatents(K, noise=0.5, scale="vocabulary"), torch.Generator().manual_seed(0))
        student.model.eval().requires_grad_(False)
        return student.backbone

    return made


@pytest.fixture
def backbone(family: str, fed: Callable[[str], Backbone]) -> Backbone:
    return fed(family)


def encoded(backbone: Backbone, samples: Sequence[Sample]) -> list[Encoded]:
    builder = backbone.builder(PROMPT, backbone.layout)
    return [builder.encode(sample, sample.answer) for sample in samples]


def batched(backbone: Backbone, items: Sequence[Encoded]) -> Batch:
    return collate(items, backbone.family, backbone.tokenizer.pad_token_id)


@contextmanager
def reading(backbone: Backbone, states: dict[tuple[int, int], Tensor]) -> Iterator[None]:
    """The decoder reads ``states`` at (sample, column) in place of embeddings."""

    def change(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        embeddings = kwargs["inputs_embeds"].clone()
        for (sample, column), state in states.items():
            embeddings[sample, column] = state
        return args, {**kwargs, "inputs_embeds": embeddings}

    handle = backbone.family.decoder(backbone.model).register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def whole(backbone: Backbone, batch: Batch, make: Callable[[], AttentionContext]) -> tuple[Tensor, AttentionContext]:
    """K + 1 passes over everything, without any cache: after each, one more latent's state before it is known."""
    size, states = rms_of_all(backbone), dict[tuple[int, int], Tensor]()
    for _ in range(K + 1):
        context = make()
        with reading(backbone, states):
            hidden = backbone.read(batch, context)
        for b, column in (batch.roles == Role.LATENT).nonzero().tolist():
            state = hidden[b, column - 1]
            states[b, column] = state * size / state.pow(2).mean().sqrt()
    return hidden, context


def rms_of_all(backbone: Backbone) -> Tensor:
    """The root mean square of all embeddings but the latents', as the decoder reads them."""
    table = backbone.model.get_input_embeddings()
    latents = backbone.tokenizer.convert_tokens_to_ids(latent_tokens(K))
    ids = [i for i in range(len(table.weight)) if i not in latents]
    return table(torch.tensor(ids)).pow(2).mean().sqrt()


def test_the_vocabulary_is_measured_as_the_decoder_reads_it(backbone: Backbone) -> None:
    torch.testing.assert_close(vocabulary_rms(backbone), rms_of_all(backbone))
    state = torch.randn(2, 1, backbone.width, dtype=torch.float64)
    fed = Feedback(backbone)(state)
    torch.testing.assert_close(fed.pow(2).mean(-1), rms_of_all(backbone).pow(2).expand(2, 1))
    torch.testing.assert_close(torch.cosine_similarity(fed, state, -1), torch.ones(2, 1, dtype=torch.float64))


@torch.no_grad()
def test_passes_equal_whole_passes(backbone: Backbone, samples: list[Sample]) -> None:
    """States and rows of all columns, under a half-open gate in the last two layers."""
    items = encoded(backbone, samples[1:])
    batch = batched(backbone, items)
    everything = torch.arange(batch.roles.shape[1]).expand(len(items), -1)
    gate = ConstantGate(0.3, ("answer->image", "question->image"), layers="last 2")

    def make() -> AttentionContext:
        return AttentionContext(gate_paths(gate, 0, batch, backbone.depth), everything, heads="each")

    context = make()
    hidden = backbone.forward(batch, context)
    expected, reference = whole(backbone, batch, make)
    assert sorted(context.recorded) == sorted(reference.recorded) == list(range(backbone.depth))
    for b, item in enumerate(items):
        length = len(item.input_ids)
        torch.testing.assert_close(hidden[b, :length], expected[b, :length], rtol=0, atol=1e-9)
        for layer, rows in reference.recorded.items():
            found = context.recorded[layer]
            assert found.shape == rows.shape
            torch.testing.assert_close(found[b, :, :length], rows[b, :, :length], rtol=0, atol=1e-9)


@torch.no_grad()
def test_generation_is_what_training_reads(backbone: Backbone, samples: list[Sample]) -> None:
    """Greedy answers of a left-padded batch, one by one, and token by token in the pass of training."""
    builder = backbone.builder(PROMPT, backbone.layout)
    prompts = [builder.prompt_of(sample) for sample in samples[1:]]
    answers = backbone.generate(prompts, 4)
    for prompt, answer in zip(prompts, answers, strict=True):
        item, ids = prompt, list[int]()
        for _ in range(4):
            hidden = backbone.forward(batched(backbone, [item]))
            ids.append(int(backbone.logits(hidden[0, -1]).argmax()))
            if ids[-1] in backbone.stops:
                break
            item = longer(backbone, item, ids[-1])
        assert backbone.tokenizer.decode(ids, skip_special_tokens=True).strip() == answer


def longer(backbone: Backbone, item: Encoded, token: int) -> Encoded:
    return replace(
        item,
        input_ids=torch.cat([item.input_ids, torch.tensor([token])]),
        roles=torch.cat([item.roles, item.roles.new_tensor([int(Role.ANSWER)])]),
        labels=torch.cat([item.labels, item.labels[-1:]]),
        position_ids=backbone.family.extend(item.position_ids, 1),
    )
