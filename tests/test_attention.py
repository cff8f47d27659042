"""The attention function against plain references: rows, gate, causality, checkpointing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from laavit.attention import AttentionContext, GatePath, attention_rows, laavit_attention
from laavit.backbones import Backbone, PromptSettings, collate
from laavit.structures import Batch, Role, Sample


class Layer(nn.Module):
    """What the interface needs of an attention layer."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.layer_idx, self.num_key_value_groups, self.is_causal = 0, groups, True


def plain_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4 written out: softmax(q k^T / sqrt(d) + B) v with a causal mask; [B, S, H, D] and the maps [B, H, S, S]."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(query.shape[-1]) + bias[:, None]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value), weights


def inputs(length: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8)]
    return tuple(torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes)  # type: ignore[return-value]


def masks(length: int = 11) -> tuple[Tensor, Tensor]:
    index = torch.arange(length)
    queries = torch.stack([index >= 7, (index >= 8) & (index < 10)])
    keys = torch.stack([(index >= 1) & (index < 5), (index >= 2) & (index < 4)])
    return queries, keys


@pytest.mark.parametrize("gamma", [1e-6, 0.3, 0.0])
def test_gated_attention_equals_equation_4(gamma: float) -> None:
    query, key, value = inputs()
    queries, keys = masks()
    bias = math.log(gamma) if gamma else -math.inf
    full = torch.zeros(2, 11, 11, dtype=torch.float64)
    full[queries[:, :, None] & keys[:, None, :]] = bias
    expected, maps = plain_attention(query, key, value, full)
    rows = torch.tensor([[5, 7, 10], [6, 8, 10]])
    context = AttentionContext(paths=(GatePath(queries, keys, bias),), rows=rows, heads="each")
    got, _ = laavit_attention(Layer(), query, key, value, None, scaling=8**-0.5, laavit=context)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    wanted = maps.gather(2, rows[:, None, :, None].expand(-1, 4, -1, 11))
    torch.testing.assert_close(context.recorded[0], wanted, rtol=1e-12, atol=1e-12)

    weight, row_weight = torch.randn_like(expected), torch.randn_like(wanted)
    gradients = torch.autograd.grad((expected * weight).sum() + (wanted * row_weight).sum(), (query, key, value))
    ours = torch.autograd.grad((got * weight).sum() + (context.recorded[0] * row_weight).sum(), (query, key, value))
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_several_paths_add_up() -> None:
    query, key, value = inputs()
    queries, keys = masks()
    full = torch.zeros(2, 11, 11, dtype=torch.float64)
    full[queries[:, :, None] & keys[:, None, :]] += -1.5
    full[queries.roll(-3, 1)[:, :, None] & keys[:, None, :]] += -0.5
    expected, _ = plain_attention(query, key, value, full)
    paths = (GatePath(queries, keys, -1.5), GatePath(queries.roll(-3, 1), keys, -0.5))
    got, _ = laavit_attention(Layer(), query, key, value, None, scaling=8**-0.5, laavit=AttentionContext(paths=paths))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_given_mask_is_kept() -> None:
    """A bool mask (as transformers makes it for padding) and an additive one give the same, gated or recorded."""
    query, key, value = inputs()
    queries, keys = masks()
    allowed = torch.ones(11, 11, dtype=torch.bool).tril().expand(2, 1, 11, 11).clone()
    allowed[1, :, :, 0] = False
    allowed[1, :, 0, 0] = True
    results = []
    for mask in (allowed, torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -math.inf)):
        context = AttentionContext(paths=(GatePath(queries, keys, -2.0),), rows=torch.tensor([[9], [9]]))
        out, _ = laavit_attention(Layer(), query, key, value, mask, scaling=8**-0.5, laavit=context)
        assert context.recorded[0][1, 0, 0] == 0
        results.append((out, context.recorded[0]))
    torch.testing.assert_close(results[0], results[1])


def test_a_mask_may_look_ahead_across_the_first_gated_query() -> None:
    """Gemma 3's image tokens see all of their image: in another sample it may end after the gate begins."""
    query, key, value = inputs()
    queries, keys = masks()
    queries[1] = False  # the first sample's gate begins at 7, the second's image lies around it
    allowed = torch.ones(11, 11, dtype=torch.bool).tril().expand(2, 1, 11, 11).clone()
    allowed[1, :, 3:10, 3:10] = True
    full = torch.zeros(2, 4, 11, 11, dtype=torch.float64).masked_fill(~allowed, -math.inf)
    full[0, :, 7:, 1:5] += -2.0
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5 + full
    expected = (scores.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)
    context = AttentionContext(paths=(GatePath(queries, keys, -2.0),))
    got, _ = laavit_attention(Layer(), query, key, value, allowed, scaling=8**-0.5, laavit=context)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_open_gate_is_bit_identical_to_no_context() -> None:
    query, key, value = inputs()
    queries, keys = masks()
    plain, _ = laavit_attention(Layer(), query, key, value, None, scaling=8**-0.5)
    gated, _ = laavit_attention(
        Layer(),
        query,
        key,
        value,
        None,
        scaling=8**-0.5,
        laavit=AttentionContext(paths=(GatePath(queries, keys, 0.0),)),
    )
    assert torch.equal(plain, gated)


def test_rows_are_a_distribution_over_the_past() -> None:
    query, key, _ = inputs()
    rows = attention_rows(query, key, torch.tensor([[3], [10]]), None, None, 8**-0.5)
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows.sum(-1)))
    assert (rows[0, :, 0, 4:] == 0).all() and (rows[0, :, 0, :4] > 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_rows_over_cached_keys_are_those_of_the_whole(masked: bool) -> None:
    query, key, _ = inputs()
    length, past = query.shape[2], 6
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone() if masked else None
    if mask is not None:
        mask[1, :, :, :2] = False  # the second sample begins with pads
    last = torch.tensor([[0, 3], [1, 2]])
    whole = attention_rows(query, key, last + past, mask, None, 8**-0.5)
    rest = None if mask is None else mask[:, :, past:]
    torch.testing.assert_close(attention_rows(query[:, :, past:], key, last, rest, None, 8**-0.5), whole)


def test_context_refuses_what_it_cannot_do() -> None:
    query, key, value = inputs()
    with pytest.raises(ValueError, match="without a key-value cache"):
        laavit_attention(
            Layer(), query[:, :, -1:], key, value, None, laavit=AttentionContext(paths=(GatePath(*masks(), bias=-1.0),))
        )
    with pytest.raises(ValueError, match="lie outside"):
        AttentionContext(rows=torch.zeros(1, 1).long(), layers=[3], num_layers=3)
    with pytest.raises(ValueError, match="ln\\(gamma\\)"):
        GatePath(*masks(), bias=0.5)
    with pytest.raises(ValueError, match="in place of layers and heads"):
        AttentionContext(layers=[0], pairs={0: [1]})
    with pytest.raises(ValueError, match="at least one head a layer"):
        AttentionContext(pairs={0: []})
    context = AttentionContext(rows=torch.zeros(2, 1).long(), pairs={0: [4]})
    with pytest.raises(ValueError, match="head 4 is selected, and layer 0 has 4 heads"):
        laavit_attention(Layer(), query, key, value, None, laavit=context)


# --- in a real model -------------------------------------------------------------------------------------------------


@pytest.fixture
def backbone(tiny_folder: Path) -> Backbone:
    return Backbone.load(str(tiny_folder), dtype="float64")


def batch_of(backbone: Backbone, samples: list[Sample]) -> Batch:
    builder = backbone.builder(PromptSettings())
    items = [builder.encode(sample, sample.answer) for sample in samples]
    for item in items:
        item.vision["pixel_values"] = item.vision["pixel_values"].double()  # type: ignore[index]
    return collate(items, backbone.family, backbone.tokenizer.pad_token_id)


def test_recorded_rows_equal_eager_output_attentions(
    backbone: Backbone, tiny_folder: Path, samples: list[Sample]
) -> None:
    batch = batch_of(backbone, samples)
    rows = torch.tensor([[3, 180], [100, 185], [0, 170]])
    context = AttentionContext(rows=rows, layers=[0, -1], num_layers=3, heads="each")
    backbone.forward(batch, context)
    eager = AutoModelForImageTextToText.from_pretrained(tiny_folder, dtype=torch.float64, attn_implementation="eager")
    out = eager.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, output_attentions=True, **batch.vision
    )
    for layer in (0, 2):
        wanted = out.attentions[layer].gather(2, rows[:, None, :, None].expand(-1, 4, -1, batch.input_ids.shape[1]))
        assert (context.recorded[layer] - wanted).abs().max() <= 1e-6
    assert set(context.recorded) == {0, 2}
    averaged = AttentionContext(rows=rows)
    backbone.forward(batch, averaged)
    maps = torch.stack(out.attentions).mean((0, 2))
    wanted = maps.gather(1, rows[:, :, None].expand(-1, -1, maps.shape[-1]))
    assert (averaged.mean_rows() - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize("merged", [False, True])
def test_pairs_of_layer_and_head_are_averaged_alone(backbone: Backbone, samples: list[Sample], merged: bool) -> None:
    batch = batch_of(backbone, samples)
    rows = torch.tensor([[3, 180], [100, 185], [0, 170]])
    every = AttentionContext(rows=rows, heads="each")
    backbone.forward(batch, every)
    pairs = {0: (3,), 2: (0, 2, 3)}
    context = AttentionContext(rows=rows, pairs=pairs, merged=merged)
    hidden = backbone.forward(batch, context)
    wanted = sum(every.recorded[layer][:, head] for layer, heads in pairs.items() for head in heads) / 4
    torch.testing.assert_close(context.mean_rows(), wanted, rtol=1e-12, atol=1e-14)
    if not merged:
        assert set(context.recorded) == {0, 2}
        torch.testing.assert_close(context.recorded[0], every.recorded[0][:, 3], rtol=1e-12, atol=1e-14)
    assert torch.equal(hidden, backbone.forward(batch))


def test_a_mask_of_each_head_is_selected_with_the_head() -> None:
    query, key, value = inputs()
    torch.manual_seed(1)
    mask = torch.randn(2, 4, 11, 11, dtype=torch.float64)
    rows = torch.tensor([[5, 10], [6, 8]])
    every, some = AttentionContext(rows=rows, heads="each"), AttentionContext(rows=rows, pairs={0: [1, 3]})
    laavit_attention(Layer(), query, key, value, mask, scaling=8**-0.5, laavit=every)
    laavit_attention(Layer(), query, key, value, mask, scaling=8**-0.5, laavit=some)
    torch.testing.assert_close(some.recorded[0], every.recorded[0][:, [1, 3]].mean(1), rtol=1e-12, atol=1e-14)


def test_checkpointing_changes_neither_loss_nor_gradients(backbone: Backbone, samples: list[Sample]) -> None:
    batch = batch_of(backbone, samples)
    answers = batch.roles == Role.ANSWER
    gradients, totals = [], []
    for checkpointing in (False, True):
        model = backbone.model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        paths = (GatePath(answers, batch.roles == Role.IMAGE, -3.0),)
        context = AttentionContext(paths=paths, rows=torch.tensor([[180], [185], [190]]))
        hidden = backbone.forward(batch, context)
        total = hidden.square().mean() + context.mean_rows().square().sum()
        model.zero_grad()
        total.backward()
        totals.append(total.detach())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert len(context.recorded) == 3
    assert torch.equal(totals[0], totals[1])
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
