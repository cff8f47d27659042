"""Samples read as one row: states, rows, losses and gradients of reading them side by side; nobody sees another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILY_NAMES
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from laavit import flex_attention
from laavit.attention import AttentionContext
from laavit.backbones import PromptSettings, collate
from laavit.backbones.chat import IGNORED
from laavit.backbones.rows import positions
from laavit.gates import ConstantGate
from laavit.latents import FeedbackLatents, LearnedLatents
from laavit.model import gate_paths, next_token_loss
from laavit.packing import Packing
from laavit.registry import UserError
from laavit.structures import Batch, Role, Sample
from laavit.students import HFStudent

LATENTS = {"none": lambda: None, "learned": lambda: LearnedLatents((2, 4)), "feedback": lambda: FeedbackLatents(3)}
WORDS = [("what colour is it?", "red"), ("is the circle left of the square?", "yes it is")]


def student_of(folder: Path, latents: str, **arguments: Any) -> HFStudent:
    student = HFStudent(str(folder), "float64", freeze=(), **arguments)
    student.setup(LATENTS[latents](), torch.Generator().manual_seed(0))
    return student


def asked(samples: list[Sample]) -> list[Sample]:
    """Two questions about each sample's images, those about one image not next to each other."""
    return [
        replace(sample, id=f"{sample.id}-{number}", question=question, answer=answer)
        for number, (question, answer) in enumerate(WORDS)
        for sample in samples
    ]


def batch_of(student: HFStudent, samples: list[Sample], **how: bool) -> Batch:
    builder = student.builder(PromptSettings(system="Look."))
    items = [builder.encode(sample, sample.answer) for sample in samples]
    return collate(items, student.backbone.family, student.backbone.tokenizer.pad_token_id, **how)


def read(student: HFStudent, batch: Batch) -> tuple[Tensor, Tensor, dict[int, Tensor], dict[str, Tensor]]:
    """Answer loss plus a term on the rows -> the logits where labels are, that sum, rows, gradients."""
    student.zero_grad()
    rows = positions((batch.roles == Role.LATENT) | (batch.roles == Role.ANSWER))
    gate = ConstantGate(0.3, ("answer->image", "question->image"), layers="last 1")
    context = AttentionContext(gate_paths(gate, 0, batch, student.backbone.depth), rows)
    hidden = student(batch, context)
    asked = batch.labels != IGNORED
    logits = student.backbone.logits(hidden[asked])
    seen = {layer: found * (rows >= 0)[..., None] for layer, found in context.recorded.items()}
    weight = torch.linspace(0.1, 1, batch.roles.shape[1], dtype=torch.float64)
    total = next_token_loss(logits, batch.labels[asked]) + sum((found * weight).sum() for found in seen.values())
    total.backward()
    grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return logits.detach(), total.detach(), {k: v.detach() for k, v in seen.items()}, grads


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=0)
    assert found[2].keys() == expected[2].keys() and len(expected[2])
    for layer, rows in expected[2].items():
        torch.testing.assert_close(found[2][layer], rows, rtol=0, atol=1e-10)
    assert found[3].keys() == expected[3].keys()
    for name, grad in expected[3].items():  # transformers' norms and rotations work in float32
        assert (found[3][name] - grad).norm() <= 1e-6 * grad.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("latents", LATENTS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_packed_equals_padded(
    family: str, latents: str, folder_of: Callable[[str], Path], samples: list[Sample]
) -> None:
    """Images of unequal sizes, several of one sample among them, under a half-open gate; beginnings shared, too."""
    student = student_of(folder_of(family), latents)
    given = asked(samples)
    expected = read(student, batch_of(student, given))
    packed = batch_of(student, given, pack=True)
    assert packed.packing is not None and len(packed.packing.owners) < packed.roles.numel()
    assert_same(read(student, packed), expected)
    assert_same(read(student, batch_of(student, given, pack=True, share=True)), expected)


def test_the_decoder_reads_one_row_and_no_mask(folder_of: Callable[[str], Path], samples: list[Sample]) -> None:
    student = student_of(folder_of("llava"), "learned")
    batch, seen = batch_of(student, samples, pack=True), []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((kwargs["inputs_embeds"].shape[:2], kwargs["position_ids"].tolist(), kwargs["attention_mask"]))

    student.backbone.family.decoder(student.model).register_forward_pre_hook(note, with_kwargs=True)
    student(batch)
    lengths = [int((batch.packing.owners == place).sum()) for place in range(3)]  # type: ignore[union-attr]
    [(shape, where, mask)] = seen
    assert shape == (1, sum(lengths)) and where == [[column for length in lengths for column in range(length)]]
    assert mask.numel() == 0  # no T x T


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("latents", ["learned", "feedback"])
def test_samples_do_not_see_each_other(
    latents: str, shared: bool, folder_of: Callable[[str], Path], samples: list[Sample]
) -> None:
    """Another image, then another question: the logits of all other samples keep their bits."""
    student = student_of(folder_of("qwen2_5_vl"), latents).eval()
    batch = batch_of(student, asked(samples) if shared else samples, pack=True, share=shared)

    def states() -> Tensor:
        with torch.no_grad():
            return student(batch, AttentionContext())

    before = states()
    count = int(batch.vision["image_grid_thw"][0].prod())
    batch.vision["pixel_values"][:count] += 1.0  # the first image of the first sample
    changed = states()
    answers = batch.roles == Role.ANSWER
    for place, sample in enumerate(batch.samples):
        moved = not torch.equal(before[place][answers[place]], changed[place][answers[place]])
        assert moved == (sample.images == samples[0].images)
    batch.input_ids[1][batch.roles[1] == Role.QUESTION] = 9
    asked_anew = states()
    for place in range(len(batch.samples)):
        moved = not torch.equal(changed[place][answers[place]], asked_anew[place][answers[place]])
        assert moved == (place == 1)


def test_checkpointing_changes_nothing(folder_of: Callable[[str], Path], samples: list[Sample]) -> None:
    student = student_of(folder_of("qwen2_5_vl"), "feedback").train()
    batch = batch_of(student, asked(samples), pack=True, share=True)
    expected = read(student, batch)
    model: Any = student.model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = read(student, batch)
    assert torch.equal(found[0], expected[0])
    for name, grad in expected[3].items():
        assert (found[3][name] - grad).norm() <= 1e-6 * grad.norm().clamp(min=1e-3), name


def test_flex_attention_learns_the_same(
    folder_of: Callable[[str], Path], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packed row as one block mask, the gate by samples; torch refuses its gradients on the CPU, but has them."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex_attention, "_gradient", lambda *tensors: False)
    found = []
    for attention in ("laavit", "laavit_flex"):
        student = student_of(folder_of("qwen2_5_vl"), "learned", attention=attention)
        for share in (False, True)[: 1 if attention == "laavit" else 2]:
            found.append(read(student, batch_of(student, asked(samples[:2])[:5], pack=True, share=share)))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_flex_attention_reads_packed_rows(
    family: str, folder_of: Callable[[str], Path], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3's image tokens see each other: its samples have masks of their own."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    student = student_of(folder_of(family), "learned", attention="laavit_flex").eval()
    with torch.no_grad():
        padded, packed = (student(batch_of(student, samples, pack=pack)) for pack in (False, True))
    used = batch_of(student, samples).roles != Role.OTHER
    torch.testing.assert_close(packed[used], padded[used], rtol=0, atol=1e-9)


def test_a_short_window_is_refused(folder_of: Callable[[str], Path], samples: list[Sample]) -> None:
    student = student_of(folder_of("qwen2_5_vl"), "none")
    layers: Any = student.backbone.family.decoder(student.model).layers
    for layer in layers:
        layer.self_attn.sliding_window = 8
    with pytest.raises(UserError, match="looks back 8 positions"):
        student(batch_of(student, samples, pack=True))


def test_rows_and_back() -> None:
    used = torch.tensor([[True, True, False], [True, False, False]])
    packing, values = Packing.of(used), torch.arange(6.0).view(2, 3).requires_grad_()
    row = packing.pack(values)
    assert row.tolist() == [[0, 1, 3]] and packing.pack_ids(values[None]).tolist() == [[[0, 1, 3]]]
    back = packing.unpack(row * 2)
    assert back.tolist() == [[0, 2, 0], [6, 0, 0]]
    (back * torch.arange(6.0).view(2, 3)).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[0, 2, 0], [6, 0, 0]]
    assert packing.owners.tolist() == [0, 0, 1] and packing.columns.tolist() == [0, 1, 0]
