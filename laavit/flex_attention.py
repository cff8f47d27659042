"""The attention function on FlexAttention: the gate as a ``score_mod``, without a mask of S x S anywhere.

Registered with transformers as ``"laavit_flex"`` (``student.attention='laavit_flex'``); the same context, the same
recorded rows and the same values as ``"laavit"`` (laavit/attention.py), whose gated suffix needs a mask of
[B, 1, S - start, S]. Masks are transformers' block masks. The kernel is compiled on a GPU; on the CPU torch runs it
uncompiled and without gradients.

Shapes: as in laavit/attention.py. Source: FlexAttention (arXiv 2412.05496).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


def gate_score(
    paths: Sequence[GatePath], dtype: torch.dtype, layout: Layout | None = None
) -> Callable[..., Tensor] | None:
    """The gate (Eq. 4) as a ``score_mod``: B = ln(gamma) looked up by the roles of query and key; None without paths.

    The biases are a tensor and no constant of the kernel, which is therefore not compiled anew when gamma changes.

    Args:
        layout: where indices are not columns; padding gets no bias.
    """
    if not paths:
        return None
    tables = [
        (torch.zeros(p.queries.shape, dtype=dtype, device=p.queries.device).masked_fill_(p.queries, p.bias), p.keys)
        for p in paths
    ]

    # Sums alone, which save nothing for a backward pass: PyTorch differentiates these functions on the spot, and under
    # gradient checkpointing a tensor that is saved here would be asked for, and the block run again, in the middle.
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        for biases, keys in tables:
            score = score + torch.where(keys[batch, key], biases[batch, query], 0.0)
        return score

    def laid_out(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert layout is not None, "of this pass"
        (sample, here), (_, there) = layout.query(row, query), layout.key(row, key)
        for biases, keys in tables:
            bias = torch.where(keys[sample, there.clamp(min=0)], biases[sample, here.clamp(min=0)], 0.0)
            score = score + torch.where(here < 0, 0.0, bias)
        return score

    return score_mod if layout is None else laid_out


#: batch and index of a query or key -> which sample of the batch, and which of its columns; column -1 pads
Place = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layout:
    """What the queries and keys of a pass are, where their index is not their column.

    Args:
        query, key: where each stands. shape: rows, queries and keys of the pass.
    """

    query: Place
    key: Place
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, context: AttentionContext | None, row: bool) -> Layout | None:
        """Of a pass that goes on after others (laavit/segments.py), or of a packed row as it is (laavit/packing.py)."""
        if context is not None and context.segment is not None:
            queries, keys = context.segment.columns, context.segment.keys
            if not context.goes_on:
                return None
            shape = len(queries), queries.shape[1], keys.shape[1]
            return cls(lambda row, index: (row, queries[row, index]), lambda row, index: (row, keys[row, index]), shape)
        if row and context is not None and context.packing is not None:
            owners, columns = context.packing.owners, context.packing.columns

            def place(row: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
                return owners[index], columns[index]

            return cls(place, place, (1, len(owners), len(owners)))
        return None

    def blocks(self, window: int | None, device: torch.device) -> BlockMask:
        """Causal by columns, within samples; ``window``: how many columns a sliding layer looks back."""

        def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            (sample, here), (other, there) = self.query(row, query), self.key(row, key)
            here = here.clamp(min=0)  # padding sees its sample's first column: no row of a softmax is empty
            allowed = (sample == other) & (there >= 0) & (there <= here)
            return allowed if window is None else allowed & (here - there < window)

        rows, queries, keys = self.shape
        return create_block_mask(mask_mod, rows, None, queries, keys, device=device, _compile=device.type != "cpu")


def blocks_of(
    context: AttentionContext | None, layout: Layout | None, query: Tensor, key: Tensor, window: int | None
) -> BlockMask:
    """The block mask of a pass whose decoder was given none, made once for layers of equal windows."""
    kept = context.blocks if context is not None else {}
    name = (window or 0,) if layout is not None else (-1, query.shape[2], key.shape[2])
    if name not in kept:
        if layout is not None:
            kept[name] = layout.blocks(window, query.device)
        else:
            kept[name] = block_mask(query.shape[0], query.shape[2], key.shape[2], device=query.device)
    return kept[name]


@torch.compiler.disable
def laavit_flex_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: BlockMask | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface on FlexAttention, with a gate and recorded rows.

    A packed row is one block mask; but where keys are put aside sample by sample, or samples have masks of their own,
    it is laid out for that.

    Args:
        query: [B, H, S, D]. key, value: [B, H / G, S, D]. attention_mask: a block mask, or None (causal); of a packed
            row ``laavit.packing.no_mask``, or that of its samples.
        kwargs: ``dropout``, ``scaling``, ``laavit`` (the context of this forward pass; None is plain attention), and
            what transformers gives beside.

    Raises:
        UserError: FlexAttention cannot do what is asked: dropout, a soft cap, sinks, or gradients on the CPU.
        ValueError: see ``laavit.attention.record_rows``.
    """
    context: AttentionContext | None = kwargs.get("laavit")
    row = context is not None and context.packing is not None and context.segment is None
    attend = attended if row and isinstance(attention_mask, Tensor) else per_sample(attended)
    return attend(module, query, key, value, attention_mask, **kwargs)


def attended(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    laavit: AttentionContext | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """See ``laavit_flex_attention``; a tensor is the mask of a packed row that is read as it is."""
    asked = {"attention dropout": dropout > 0.0, "a soft cap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    refused = [name for name, given in asked.items() if given is not None and given is not False]
    if refused:
        raise UserError(f"attention: '{FLEX}' cannot do {' or '.join(refused)}; take 'laavit'")
    if query.device.type == "cpu" and torch.is_grad_enabled() and _gradient(query, key, value):
        raise UserError(f"attention: FlexAttention has no gradients on the CPU; take 'laavit' in place of '{FLEX}'")
    if laavit is not None and laavit.segment is not None:
        key, value = laavit.segment.joined(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    row = isinstance(attention_mask, Tensor)
    layout, mask = Layout.of(laavit, row), attention_mask
    if layout is not None or not isinstance(mask, BlockMask):
        mask = blocks_of(laavit, layout, query, key, kwargs.get("sliding_window"))  # type: ignore[arg-type]
    score_mod = None
    if laavit is not None:
        layer = _recorded(module, query, key, None if row else mask, scaling, laavit)
        score_mod = gate_score(laavit.paths_at(layer), torch.promote_types(query.dtype, torch.float32), layout)
    options: dict[str, Any] = {"score_mod": score_mod, "block_mask": mask, "scale": scaling, "enable_gqa": True}
    if query.device.type == "cpu":
        out = flex_attention(query, key, value, **options)
    else:
        out = compile_friendly_flex_attention(query, key, value, training=module.training, **options)
    return cast(Tensor, out).transpose(1, 2).contiguous(), None


def _recorded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: BlockMask | None,
    scaling: float | None,
    context: AttentionContext,
) -> int:
    """Record what a context asks of a layer, of a packed row (no mask) sample by sample; returns the layer's index."""
    layer, packing = int(module.layer_idx), context.packing  # type: ignore[arg-type]
    if packing is None or mask is not None:
        return record_rows(module, query, key, mask, scaling, context)
    if not context.wants(layer):
        return layer
    query, key = (packing.unpack(states.transpose(1, 2)).transpose(1, 2) for states in (query, key))
    return record_rows(module, query, key, None, scaling, context)


def _gradient(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


AttentionInterface.register(FLEX, laavit_flex_attention)
AttentionMaskInterface.register(FLEX, block_mask)
