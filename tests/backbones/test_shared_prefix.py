"""Questions about one image that read it once: states, rows, losses and gradients of reading it with every question."""

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
from laavit.backbones.base import shared_prefix
from laavit.backbones.chat import IGNORED
from laavit.backbones.rows import positions
from laavit.gates import ConstantGate
from laavit.latents import NO_LATENTS, FeedbackLatents, LearnedLatents, check_attention
from laavit.model import gate_paths, next_token_loss
from laavit.registry import UserError
from laavit.structures import Batch, Encoded, Role, Sample
from laavit.students import HFStudent

LATENTS = {"none": lambda: None, "learned": lambda: LearnedLatents(3), "feedback": lambda: FeedbackLatents(3)}
WORDS = [("what colour is it?", "red"), ("is the circle left of the square?", "yes it is"), ("how many?", "two")]


def student_of(folder: Path, latents: str, **arguments: Any) -> HFStudent:
    student = HFStudent(str(folder), "float64", freeze=(), **arguments)
    student.setup(LATENTS[latents](), torch.Generator().manual_seed(0))
    return student


def asked(samples: list[Sample]) -> list[Sample]:
    """Three questions about each sample's images, those about one image not next to each other."""
    return [
        replace(sample, id=f"{sample.id}-{number}", question=question, answer=answer)
        for number, (question, answer) in enumerate(WORDS)
        for sample in samples
    ]


def batches(student: HFStudent, samples: list[Sample], order: str = "image_first") -> tuple[Batch, Batch]:
    """The same samples, read one by one and with their beginnings shared."""
    builder = student.builder(PromptSettings(system="Look.", order=order))
    items = [builder.encode(sample, sample.answer) for sample in samples]
    pad = student.backbone.tokenizer.pad_token_id
    return collate(items, student.backbone.family, pad), collate(items, student.backbone.family, pad, share=True)


def read(student: HFStudent, batch: Batch) -> tuple[Tensor, Tensor, dict[int, Tensor], dict[str, Tensor]]:
    """Answer loss plus a term on the rows -> the logits where labels are, that sum, rows, gradients."""
    student.zero_grad()
    roles = batch.roles
    rows = positions((roles == Role.LATENT) | (roles == Role.ANSWER))
    gate = ConstantGate(0.3, ("answer->image", "question->image"), layers="last 1")
    context = AttentionContext(gate_paths(gate, 0, batch, student.backbone.depth), rows)
    hidden = student(batch, context)
    asked = batch.labels != IGNORED
    logits = student.backbone.logits(hidden[asked])
    seen = {layer: found * (rows >= 0)[..., None] for layer, found in context.recorded.items()}
    weight = torch.linspace(0.1, 1, roles.shape[1], dtype=torch.float64)
    total = next_token_loss(logits, batch.labels[asked]) + sum((found * weight).sum() for found in seen.values())
    total.backward()
    grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return logits.detach(), total.detach(), {k: v.detach() for k, v in seen.items()}, grads


@pytest.mark.parametrize("latents", LATENTS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_shared_equals_separate(
    family: str, latents: str, folder_of: Callable[[str], Path], samples: list[Sample]
) -> None:
    """Images of unequal sizes, several of one sample among them, under a half-open gate; the tower learns, too."""
    student = student_of(folder_of(family), latents)
    apart, together = batches(student, asked(samples))
    assert together.shared is not None and len(together.shared.first) == len(samples)
    expected, found = read(student, apart), read(student, together)
    if latents == "none":
        alone = [read(student, batch)[0] for batch in batches(student, samples)]
        torch.testing.assert_close(alone[0], alone[1], rtol=0, atol=1e-9)  # where no two begin alike
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=0)
    assert found[2].keys() == expected[2].keys()
    for layer, rows in expected[2].items():
        torch.testing.assert_close(found[2][layer], rows, rtol=0, atol=1e-10)
    assert found[3].keys() == expected[3].keys()
    for name, grad in expected[3].items():  # transformers' norms and rotations work in float32
        assert (found[3][name] - grad).norm() <= 1e-6 * grad.norm().clamp(min=1e-3), name


def test_adapters_learn_the_same(folder_of: Callable[[str], Path], samples: list[Sample]) -> None:
    """Without dropout, which draws as many numbers as there are positions."""
    student = student_of(folder_of("qwen2_5_vl"), "feedback", lora={"rank": 2, "dropout": 0.0})
    torch.manual_seed(1)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:  # they start at zero, and with them all gradients of the others
            torch.nn.init.normal_(parameter, std=0.05)
    apart, together = batches(student, asked(samples))
    expected, found = read(student, apart), read(student, together)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-9)
    for name, grad in expected[3].items():
        assert (found[3][name] - grad).norm() <= 1e-6 * grad.norm().clamp(min=1e-3), name


def test_checkpointing_changes_nothing(folder_of: Callable[[str], Path], samples: list[Sample]) -> None:
    student = student_of(folder_of("qwen2_5_vl"), "feedback").train()
    _, batch = batches(student, asked(samples))
    expected = read(student, batch)
    student.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = read(student, batch)
    assert torch.equal(found[0], expected[0])
    for name, grad in expected[3].items():
        assert (found[3][name] - grad).norm() <= 1e-6 * grad.norm().clamp(min=1e-3), name


def test_pixels_reach_their_own_questions_alone(folder_of: Callable[[str], Path], samples: list[Sample]) -> None:
    student = student_of(folder_of("qwen2_5_vl"), "learned").eval()
    batch = batches(student, asked(samples))[1]
    with torch.no_grad():
        before = student(batch)
        counts = batch.vision["image_grid_thw"].prod(-1).tolist()
        batch.vision["pixel_values"][: counts[0]] += 1.0  # the first image of the first sample
        after = student(batch)
    answers = batch.roles == Role.ANSWER
    for place, sample in enumerate(batch.samples):
        moved = not torch.equal(before[place][answers[place]], after[place][answers[place]])
        assert moved == (sample.images == samples[0].images)


def test_what_is_shared(folder_of: Callable[[str], Path], samples: list[Sample]) -> None:
    student = student_of(folder_of("qwen2_5_vl"), "none")
    builder = student.builder(PromptSettings())
    image = student.backbone.family.image_token_id
    items = [builder.encode(sample, sample.answer) for sample in asked(samples[:2])]
    shared = shared_prefix(items, image)
    assert shared is not None
    assert shared.owners.tolist() == [0, 1, 0, 1, 0, 1] and shared.first.tolist() == [0, 1]
    assert shared.stops.tolist() == [max(span.end for span in item.spans) for item in items[:2]]
    alone = shared_prefix(items[:2], image)  # no two begin alike: as many passes as in other processes
    assert alone is not None and alone.owners.tolist() == alone.first.tolist() == [0, 1]
    other = replace(items[2], input_ids=items[2].input_ids.clone())
    other.input_ids[0] += 1
    assert shared_prefix([items[0], other], image).owners.tolist() == [0, 1]  # type: ignore[union-attr]
    question_first = student.builder(PromptSettings(order="question_first"))
    first: list[Encoded] = [question_first.encode(sample, sample.answer) for sample in asked(samples[:1])]
    assert shared_prefix(first, image) is None


@pytest.mark.parametrize("latents", ["learned", pytest.param("feedback", marks=pytest.mark.slow)])
def test_flex_attention_learns_the_same(
    latents: str, folder_of: Callable[[str], Path], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch refuses gradients of FlexAttention on the CPU, although its uncompiled kernel has them."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex_attention, "_gradient", lambda *tensors: False)
    found = []
    for attention in ("laavit", "laavit_flex"):
        student = student_of(folder_of("qwen2_5_vl"), latents, attention=attention)
        found.append(read(student, batches(student, asked(samples[:2])[:5])[1]))
    for ours, expected in zip(found[1][:2], found[0][:2], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    for layer, rows in found[0][2].items():
        torch.testing.assert_close(found[1][2][layer], rows, rtol=0, atol=1e-10)
    for name, grad in found[0][3].items():
        assert (found[1][3][name] - grad).norm() <= 1e-6 * grad.norm().clamp(min=1e-3), name


def test_an_attention_that_keeps_no_keys_is_refused() -> None:
    with pytest.raises(UserError, match=r"shared beginning are read in several passes, and 'sdpa' keeps no keys"):
        check_attention(NO_LATENTS, "sdpa", shared=True)


def test_rows_of_the_beginning_are_refused(folder_of: Callable[[str], Path], samples: list[Sample]) -> None:
    student = student_of(folder_of("qwen2_5_vl"), "none")
    _, batch = batches(student, asked(samples[:1]))
    with pytest.raises(ValueError, match="rows of a beginning"):
        student(batch, AttentionContext(rows=torch.zeros(3, 1, dtype=torch.long)))
