"""FlexAttention against the same function on SDPA: values, gradients, rows; and what it refuses.

torch refuses gradients of FlexAttention on the CPU, although its uncompiled kernel has them: ``with_gradients`` lifts
the refusal, so that the gate's ``score_mod`` is differentiated by torch's own backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex

import laavit.flex_attention as flex
from laavit.attention import AttentionContext, GatePath, laavit_attention
from laavit.backbones import Backbone, PromptSettings, collate
from laavit.flex_attention import FLEX, block_mask, gate_score, laavit_flex_attention
from laavit.registry import UserError
from laavit.structures import Batch, Role, Sample
from laavit.students import HFStudent

LENGTH = 11


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch traces even the uncompiled kernel, seconds a shape; its debug flag runs it as it stands."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.fixture
def with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_gradient", lambda *tensors: False)


class Layer(nn.Module):
    """What the interface needs of an attention layer."""

    def __init__(self, layer: int = 0) -> None:
        super().__init__()
        self.layer_idx, self.num_key_value_groups, self.is_causal = layer, 2, True


def inputs(dtype: torch.dtype = torch.float64, heads: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, heads, LENGTH, 8), (2, heads // 2, LENGTH, 8), (2, heads // 2, LENGTH, 8)]
    return [torch.randn(*shape, dtype=dtype) for shape in shapes]


def two_paths(first: float, second: float, layers: frozenset[int] | None = None) -> tuple[GatePath, ...]:
    index = torch.arange(LENGTH)
    images = torch.stack([(index >= 1) & (index < 5), (index >= 2) & (index < 4)])
    answers = torch.stack([index >= 7, (index >= 8) & (index < 10)])
    questions = torch.stack([index == 6, (index >= 5) & (index < 8)])
    return GatePath(answers, images, first, layers), GatePath(questions, images, second)


ROWS = torch.tensor([[5, 7, 10], [6, 8, 10]])


@pytest.mark.parametrize("heads", [4, 6])
@pytest.mark.parametrize("bias", [(math.log(1e-6), -0.5), (-math.inf, -math.inf), (0.0, -math.inf)])
def test_values_gradients_and_rows_equal_sdpa(with_gradients: None, bias: tuple[float, float], heads: int) -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(heads=heads)]
    found = []
    for function in (laavit_attention, laavit_flex_attention):
        context = AttentionContext(paths=two_paths(*bias), rows=ROWS, heads="each")
        out, _ = function(Layer(), *tensors, None, scaling=8**-0.5, laavit=context)
        torch.manual_seed(1)
        rows = context.recorded[0]
        total = (out * torch.randn_like(out)).sum() + (rows * torch.randn_like(rows)).sum()
        found.append((out.detach(), rows.detach(), *torch.autograd.grad(total, tensors)))
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert torch.isfinite(found[1][2]).all()


def test_float32_equals_sdpa() -> None:
    outs = [
        function(Layer(), *inputs(torch.float32), None, laavit=AttentionContext(paths=two_paths(-1.5, -math.inf)))[0]
        for function in (laavit_attention, laavit_flex_attention)
    ]
    assert outs[1].dtype == torch.float32
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-6)


def test_padding_and_a_look_ahead_are_kept() -> None:
    """A left-padded sample, and an image whose tokens see all of it: one mask, as blocks and as bools."""

    def ahead(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        image = (sample == 1) & (query >= 3) & (query < 8) & (key >= 3) & (key < 8)
        return (key <= query) | image

    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :2] = False
    blocks = block_mask(2, LENGTH, LENGTH, mask_function=ahead, attention_mask=real)
    index = torch.arange(LENGTH)
    allowed = ahead(torch.arange(2)[:, None, None, None], None, index[:, None], index) & real[:, None, None]
    found = []
    for function, mask in ((laavit_attention, allowed), (laavit_flex_attention, blocks)):
        context = AttentionContext(paths=two_paths(-2.0, -math.inf), rows=ROWS)
        found.append((function(Layer(), *inputs(), mask, laavit=context)[0], context.recorded[0]))
    torch.testing.assert_close(found[1][0][0, 2:], found[0][0][0, 2:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1][0][1], found[0][0][1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-12, atol=1e-12)


def test_open_gates_and_other_layers_are_bit_identical_to_no_gate() -> None:
    plain, _ = laavit_flex_attention(Layer(2), *inputs(), None)
    for paths in (two_paths(0.0, 0.0), two_paths(-1.0, 0.0, frozenset({0, 1}))):
        gated, _ = laavit_flex_attention(Layer(2), *inputs(), None, laavit=AttentionContext(paths=paths))
        assert torch.equal(plain, gated)
    assert gate_score((), torch.float64) is None


def test_some_layers_alone_are_gated() -> None:
    context = AttentionContext(paths=two_paths(-1.0, 0.0, frozenset({1})))
    for layer in (0, 1):
        sdpa, _ = laavit_attention(Layer(layer), *inputs(), None, laavit=context)
        ours, _ = laavit_flex_attention(Layer(layer), *inputs(), None, laavit=context)
        torch.testing.assert_close(ours, sdpa, rtol=1e-12, atol=1e-12)
        plain, _ = laavit_attention(Layer(layer), *inputs(), None)
        assert torch.equal(sdpa, plain) == (layer == 0)


def test_what_it_cannot_do_is_refused() -> None:
    query, key, value = inputs()
    with pytest.raises(UserError, match=r"no gradients on the CPU; take 'laavit' in place of 'laavit_flex'"):
        laavit_flex_attention(Layer(), query.requires_grad_(), key, value, None)
    with pytest.raises(UserError, match="cannot do attention dropout; take 'laavit'"):
        laavit_flex_attention(Layer(), query, key, value, None, dropout=0.1)
    with pytest.raises(ValueError, match="without a key-value cache"), torch.no_grad():
        gated = AttentionContext(paths=two_paths(-1.0, 0.0))
        laavit_flex_attention(Layer(), query[:, :, -1:], key, value, None, laavit=gated)


@pytest.mark.slow
@torch.no_grad()
def test_the_compiled_kernel_is_equal_and_stays_compiled_while_gamma_changes() -> None:
    """On the CPU, where torch compiles the forward pass alone: one graph a schedule, one more for other lengths."""
    compiled = torch.compile(torch_flex.flex_attention)
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters["stats"].clear()
    for length, graphs in ((256, 1), (300, 2), (310, 2)):
        query, key, value = (torch.randn(2, heads, length, 16) for heads in (4, 2, 2))
        index = torch.arange(length)
        answers, images = (mask.repeat(2, 1) for mask in (index >= length - 40, (index >= 10) & (index < 100)))
        for bias in (math.log(1e-6), -1.0, -math.inf):
            paths = (GatePath(answers, images, bias),)
            blocks, score = block_mask(2, length, length), gate_score(paths, torch.float32)
            ours = compiled(query, key, value, score_mod=score, block_mask=blocks, enable_gqa=True)
            expected, _ = laavit_attention(Layer(), query, key, value, None, laavit=AttentionContext(paths=paths))
            torch.testing.assert_close(ours.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == graphs


# --- in a real model --------------------------------------------------------------------------------------------------


def batch_of(backbone: Backbone, samples: Sequence[Sample]) -> Batch:
    builder = backbone.builder(PromptSettings())
    items = [builder.encode(sample, sample.answer) for sample in samples]
    return collate(items, backbone.family, backbone.tokenizer.pad_token_id)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_a_model_runs_it_by_name(tiny_folder: Path, samples: list[Sample], gamma: float) -> None:
    states, rows = [], []
    for attention in ("laavit", FLEX):
        backbone = Backbone.load(str(tiny_folder), dtype="float64", attention=attention)
        batch = batch_of(backbone, samples)
        bias = math.log(gamma) if gamma else -math.inf
        path = GatePath(batch.roles == Role.ANSWER, batch.roles == Role.IMAGE, bias, frozenset({0, 2}))
        context = AttentionContext(paths=(path,), rows=torch.tensor([[180], [185], [190]]))
        states.append(backbone.forward(batch, context))
        rows.append(context.mean_rows())
    torch.testing.assert_close(states[1], states[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_it_generates_the_same(tiny_folder: Path, samples: list[Sample]) -> None:
    """Left-padded prompts and a key-value cache."""
    found = []
    for attention in ("laavit", FLEX):
        backbone = Backbone.load(str(tiny_folder), dtype="float64", attention=attention)
        prompts = [backbone.builder(PromptSettings()).prompt_of(sample) for sample in samples]
        found.append(backbone.generate(prompts, 4))
    assert found[0] == found[1] and any(found[0])


def test_a_student_takes_an_attention_that_knows_gates(tiny_folder: Path) -> None:
    assert HFStudent(str(tiny_folder), attention=FLEX).backbone.depth == 3
    with pytest.raises(UserError, match="attention: got 'sdpa'; allowed: laavit, laavit_flex"):
        HFStudent(str(tiny_folder), attention="sdpa")
