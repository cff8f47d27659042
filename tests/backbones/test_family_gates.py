"""What a closed gate closes, in every family: pixels change, and only what may see them moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILY_NAMES
from PIL import Image
from torch import Tensor
from torch.nn.attention import flex_attention

from laavit.attention import AttentionContext
from laavit.backbones import Backbone, PromptSettings, collate
from laavit.flex_attention import FLEX
from laavit.gates import ConstantGate, Gate
from laavit.latents import LearnedLatents
from laavit.model import LaViT, gate_paths, image_blocks
from laavit.structures import Batch, Role, Sample
from laavit.students import HFStudent

CLOSED = ("answer->image", "question->image", "latent->image")
pytestmark = pytest.mark.parametrize("family", FAMILY_NAMES)


@pytest.fixture(scope="session")
def student_of(folder_of: Callable[[str], Path]) -> Callable[[str], HFStudent]:
    """A family's student with latents; treat as read-only."""

    @cache
    def made(family: str) -> HFStudent:
        student = HFStudent(str(folder_of(family)), "float64")
        student.setup(LearnedLatents(3, "mean", 0.5), torch.Generator().manual_seed(0))
        return student

    return made


@pytest.fixture
def student(family: str, student_of: Callable[[str], HFStudent]) -> HFStudent:
    return student_of(family)


@pytest.fixture
def repainted(tmp_path: Path) -> list[list[Sample]]:
    """The same two questions twice, about other pixels of the same sizes: one wide image; one image of two."""
    random, found = np.random.default_rng(0), []
    for version in range(2):
        paths = []
        for name, size in (("wide", (40, 100)), ("high", (60, 40)), ("small", (40, 44))):
            paths.append(tmp_path / f"{name}-{version}.png")
            Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
        one = Sample("one", (paths[0],), "What colour is it?", "blue")
        two = Sample("two", (paths[1], paths[2]), "Is it left of it?", "no, not at all")
        found.append([one, two])
    return found


def batch_of(student: HFStudent, samples: Sequence[Sample]) -> Batch:
    builder = student.builder(PromptSettings(system="Look."))
    items = [builder.encode(sample, sample.answer) for sample in samples]
    return collate(items, student.backbone.family, student.backbone.tokenizer.pad_token_id)


@torch.no_grad()
def moved(student: HFStudent, gate: Gate, repainted: list[list[Sample]]) -> float:
    """How far the answers' logits move when the pixels change."""
    model = LaViT(student, gate).train()
    one, two = (model.observe(batch_of(student, samples)).logits for samples in repainted)
    return float((one - two).abs().max())


def test_a_closed_gate_leaves_one_way_at_most(student: HFStudent, repainted: list[list[Sample]]) -> None:
    """All paths closed: bit-equal logits. Answer and question closed (LIVR): the latents are the one way that is left.

    Row separators and tile markers are no way around: nothing but the three paths was closed.
    """
    assert moved(student, ConstantGate(0.0, CLOSED), repainted) == 0.0
    assert moved(student, ConstantGate(0.0, CLOSED[:2]), repainted) > 1e-4
    assert moved(student, ConstantGate(0.0, CLOSED, layers="first 1"), repainted) > 1e-4  # open further up


def test_without_latents_no_way_is_left(
    family: str, open_family: Callable[[str], Backbone], repainted: list[list[Sample]]
) -> None:
    """Answer and question closed: no pixel moves an answer's logits, to the bit. Answer alone: the question tells."""
    student = HFStudent.of(open_family(family), family, ())
    assert moved(student, ConstantGate(0.0, CLOSED[:2]), repainted) == 0.0
    assert moved(student, ConstantGate(0.0, CLOSED[:1]), repainted) > 1e-4
    student.eval()


@torch.no_grad()
def test_what_comes_later_moves_nothing_before(student: HFStudent, repainted: list[list[Sample]]) -> None:
    """The second image's pixels: neither the first image nor what stands between. The answer's end: nothing at all.

    A closed gate opens no way back, and the later tokens do move what may see them.
    """
    first, second = repainted[0][1], repainted[1][1]
    batch = batch_of(student, [first])
    other = batch_of(student, [replace(first, images=(first.images[0], second.images[1]))])
    edited = replace(batch, input_ids=batch.input_ids.clone())
    edited.input_ids[0, -2] = edited.input_ids[0, 0]
    assert not torch.equal(edited.input_ids, batch.input_ids)
    begin = min(span.start for span in batch.spans[0] if span.tile.image == 1)
    for value in (0.0, 0.5):
        context = AttentionContext(paths=gate_paths(ConstantGate(value, CLOSED), 0, batch, student.backbone.depth))
        states, painted, ended = (student.backbone.forward(each, context)[0] for each in (batch, other, edited))
        torch.testing.assert_close(painted[:begin], states[:begin], rtol=0, atol=1e-10)
        assert (painted[begin:] - states[begin:]).abs().max() > 1e-3
        assert torch.equal(ended[:-2], states[:-2]) and not torch.equal(ended[-2:], states[-2:])


@torch.no_grad()
def test_the_image_itself_is_as_without_a_gate(student: HFStudent, repainted: list[list[Sample]]) -> None:
    """Separators and markers within an image go on reading it, so its states do not shift between training and test."""
    batch = batch_of(student, repainted[0][:1])
    blocks = image_blocks(batch)
    inside = blocks & (batch.roles != Role.IMAGE)
    context = AttentionContext(paths=gate_paths(ConstantGate(0.0, CLOSED), 0, batch, student.backbone.depth))
    gated, plain = (student.backbone.forward(batch, each) for each in (context, None))
    torch.testing.assert_close(gated[blocks], plain[blocks], rtol=0, atol=1e-10)
    family = student.backbone.family.config.model_type
    assert bool(inside.any()) == (family in ("llava_onevision", "idefics3", "smolvlm"))


@torch.no_grad()
def test_answers_look_at_no_separator_of_a_closed_image(student: HFStudent, repainted: list[list[Sample]]) -> None:
    batch = batch_of(student, repainted[0])
    rows = torch.where(batch.roles == Role.ANSWER, torch.arange(batch.roles.shape[1]), -1).sort(1, descending=True)[0]
    found: dict[float, Tensor] = {}
    for value in (0.0, 1.0):
        paths = gate_paths(ConstantGate(value), 0, batch, student.backbone.depth)
        context = AttentionContext(paths=paths, rows=rows[:, :2])
        student.backbone.forward(batch, context)
        found[value] = (context.mean_rows() * image_blocks(batch)[:, None]).sum(-1)
    assert (found[0.0] == 0).all() and (found[1.0] > 0).all()


@torch.no_grad()
def test_flex_attention_gives_the_same(
    family: str,
    folder_of: Callable[[str], Path],
    open_family: Callable[[str], Backbone],
    repainted: list[list[Sample]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """States and rows, gated in two layers, under the family's own masks (sliding windows, images seen as a whole)."""
    monkeypatch.setattr(
        flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True
    )  # else seconds of tracing a shape
    found = []
    for backbone in (open_family(family), Backbone.load(str(folder_of(family)), "float64", attention=FLEX)):
        builder = backbone.builder(PromptSettings(system="Look."))
        items = [builder.encode(sample, sample.answer) for sample in repainted[0]]
        batch = collate(items, backbone.family, backbone.tokenizer.pad_token_id)
        rows = torch.tensor([[len(item.input_ids) - 2, 5] for item in items])
        paths = gate_paths(ConstantGate(0.2, CLOSED[:2], layers="last 2"), 0, batch, backbone.depth)
        context = AttentionContext(paths=paths, rows=rows)
        states = backbone.forward(batch, context)
        found.append([states[b, : len(item.input_ids)] for b, item in enumerate(items)] + [context.mean_rows()])
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
