"""The attention function on FlexAttention: the gate as a ``score_mod``, without a mask of S x S anywhere.

Registered with transformers as ``"laavit_flex"`` (``student.attention='laavit_flex'``); the same context, the same
recorded rows and the same values as ``"laavit"`` (laavit/attention.py), whose gated suffix needs a mask of
[B, 1, S - start, S]. Masks are transformers' block masks. The kernel is compiled on a GPU; on the CPU torch runs it
uncompiled and without gradients.

Shapes: as in laavit/attention.py. Source: FlexAttention (arXiv 2412.05496).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.masking_utils import (
    AttentionMaskInterface,
    add_offsets_to_mask_function,
    and_masks,
    causal_mask_function,
    padding_mask_function,
    prepare_padding_mask,
)
from transformers.modeling_utils import AttentionInterface

from laavit.attention import AttentionContext, GatePath, record_rows
from laavit.packing import per_sample
from laavit.registry import UserError
from laavit.segments import Segment

FLEX = "laavit_flex"


def block_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: object,
) -> BlockMask:
    """transformers' ``flex_attention_mask``, compiled on a GPU alone: a CPU would spend seconds on its compiler."""
    if attention_mask is not None and not bool(attention_mask.all()):
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        mask_function = and_masks(mask_function, padding_mask_function(padding))
    mask_function = add_offsets_to_mask_function(mask_function, q_offset, kv_offset)
    on_gpu = torch.device(device).type != "cpu"
    return create_block_mask(mask_function, batch_size, None, q_length, kv_length, device=device, _compile=on_gpu)


def gate_score(paths: Sequence[GatePath], dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """The gate (Eq. 4) as a ``score_mod``: B = ln(gamma) looked up by the roles of query and key; None without paths.

    The biases are a tensor and no constant of the kernel, which is therefore not compiled anew when gamma changes.
    """
    if not paths:
        return None
    tables = [
        (torch.zeros(p.queries.shape, dtype=dtype, device=p.queries.device).masked_fill_(p.queries, p.bias), p.keys)
        for p in paths
    ]

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        for biases, keys in tables:
            score = score + torch.where(keys[batch, key], biases[batch, query], 0.0)
        return score

    return score_mod


def segment_blocks(context: AttentionContext, window: int | None) -> BlockMask:
    """The block mask of a pass that goes on after others, made once for layers of equal windows: causal by columns."""
    segment, key = context.segment, (window or 0,)
    assert segment is not None, "segment_blocks is called for a part of a sequence"
    if key not in context.blocks:
        queries, keys = segment.columns.clamp(min=0), segment.keys

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            here, there = queries[batch, query], keys[batch, key]
            allowed = (there >= 0) & (there <= here)
            return allowed if window is None else allowed & (here - there < window)

        (rows, count), device = queries.shape, queries.device
        context.blocks[key] = create_block_mask(
            mask_mod, rows, None, count, keys.shape[1], device=device, _compile=device.type != "cpu"
        )
    return context.blocks[key]


def by_columns(segment: Segment, score_mod: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
    """A gate's ``score_mod`` over the columns of a batch, for the queries and keys of a pass; none for padding."""
    if score_mod is None:
        return None
    queries, keys = segment.columns, segment.keys

    def moved(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        here, there = queries[batch, query], keys[batch, key]
        gated = score_mod(score, batch, head, here.clamp(min=0), there.clamp(min=0))
        return torch.where(here < 0, score, gated)

    return moved


@torch.compiler.disable
@per_sample
def laavit_flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    laavit: AttentionContext | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface on FlexAttention, with a gate and recorded rows.

    Args:
        query: [B, H, S, D]. key, value: [B, H / G, S, D]. attention_mask: a block mask, or None (causal).
        laavit: the context of this forward pass; None is plain attention.

    Raises:
        UserError: FlexAttention cannot do what is asked: dropout, a soft cap, sinks, or gradients on the CPU.
        ValueError: see ``laavit.attention.record_rows``.
    """
    asked = {"attention dropout": dropout > 0.0, "a soft cap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    refused = [name for name, given in asked.items() if given is not None and given is not False]
    if refused:
        raise UserError(f"attention: '{FLEX}' cannot do {' or '.join(refused)}; take 'laavit'")
    if query.device.type == "cpu" and torch.is_grad_enabled() and _gradient(query, key, value):
        raise UserError(f"attention: FlexAttention has no gradients on the CPU; take 'laavit' in place of '{FLEX}'")
    mask, segment = attention_mask, laavit.segment if laavit is not None else None
    if segment is not None:
        key, value = segment.joined(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    if laavit is not None and laavit.goes_on:
        mask = segment_blocks(laavit, kwargs.get("sliding_window"))  # type: ignore[arg-type]
    if mask is None:
        mask = block_mask(query.shape[0], query.shape[2], key.shape[2], device=query.device)
    score_mod = None
    if laavit is not None:
        layer = record_rows(module, query, key, mask, scaling, laavit)
        score_mod = gate_score(laavit.paths_at(layer), torch.promote_types(query.dtype, torch.float32))
        if segment is not None and laavit.goes_on:
            score_mod = by_columns(segment, score_mod)
    options: dict[str, Any] = {"score_mod": score_mod, "block_mask": mask, "scale": scaling, "enable_gqa": True}
    if query.device.type == "cpu":
        out = flex_attention(query, key, value, **options)
    else:
        out = compile_friendly_flex_attention(query, key, value, training=module.training, **options)
    return cast(Tensor, out).transpose(1, 2).contiguous(), None


def _gradient(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


AttentionInterface.register(FLEX, laavit_flex_attention)
AttentionMaskInterface.register(FLEX, block_mask)
