"""THE attention function: a gate's bias and recorded attention rows, for every decoder of transformers.

It is registered with transformers as the implementation ``"laavit"`` and reads one extra keyword argument of the
model's ``forward``, ``laavit=AttentionContext(...)``. Nothing is patched; without a context it *is* transformers' SDPA.

Two things are done beside plain attention, both without an S x S map:

* **Gate** (LaViT, arXiv 2601.10129, Eq. 4): ``softmax(q k^T / sqrt(d) + B) v`` with ``B = ln(gamma)`` on named
  query -> key paths. Gated queries stand at the end of the sequence (question or answer), so the queries before the
  first gated one go through causal SDPA over their own prefix, and only the rest pays for an explicit mask of shape
  [B, 1, S - start, S].
* **Rows** (Eq. 2 and 7): the softmax rows of chosen queries alone, O(R * S), averaged over heads, or over a selection
  of heads, where they arise. Under non-re-entrant gradient checkpointing the layer runs twice; the first run's rows
  carry the gradient and stay.

Shapes: ``B`` batch, ``S`` sequence, ``H`` heads, ``G`` query heads a key head, ``R`` recorded rows, ``D`` head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from laavit.gate_path import GatePath as GatePath
from laavit.packing import Packing, per_sample
from laavit.segments import Segment

IMPLEMENTATION = "laavit"


@dataclass
class AttentionContext:
    """What one forward pass asks of its attention layers, and where the recorded rows come back.

    Args:
        paths: gate paths; those with ``bias == 0`` are dropped, so an open gate is bit-identical to no gate.
        rows: long [B, R], the query positions whose softmax rows are recorded; ``-1`` pads a ragged batch. With a
            key-value cache they count in the new queries, and a row spans the cached keys, too.
        layers: indices of the layers to record, negative ones count from the end (``num_layers`` is then needed);
            ``None`` records all.
        num_layers: the decoder's depth, to resolve negative layer indices.
        heads: ``"mean"`` records [B, R, S] a layer, ``"each"`` records [B, H, R, S].
        pairs: a selection, layer -> heads (counted from 0), in place of ``layers`` and ``heads``: [B, R, S] a layer,
            the mean over its selected heads; ``mean_rows`` is the mean over all pairs. No other head's rows are
            computed.
        merged: keep one running sum over the layers, for ``mean_rows``, in place of the rows of each (``recorded``
            stays empty): many rows of a deep decoder then cost the memory of one layer's.
        segment: where the pass reads a part of the sequence: which, and what was read before it. Then rows count in
            the pass's own queries, and paths, but for the first pass, in the columns of the batch.
        packing: where the pass reads a packed row (B is 1 for the decoder): which position is whose. All else here
            counts in samples and their columns.
    """

    paths: tuple[GatePath, ...] = ()
    rows: Tensor | None = None
    layers: Collection[int] | None = None
    num_layers: int | None = None
    heads: str = "mean"
    pairs: Mapping[int, Collection[int]] | None = None
    merged: bool = False
    segment: Segment | None = None
    packing: Packing | None = None
    recorded: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _sum: Tensor | None = field(default=None, repr=False)
    _heads: dict[int, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)
    _summed: set[int] = field(default_factory=set, repr=False)
    _masks: dict[tuple[int, ...], tuple[Tensor | None, Tensor]] = field(default_factory=dict, repr=False)
    #: FlexAttention's block masks of a pass that goes on, by the layers' window
    blocks: dict[tuple[int, ...], BlockMask] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.heads not in ("mean", "each"):
            raise ValueError(f"heads is 'mean' or 'each', got {self.heads!r}")
        if self.pairs is not None:
            if self.layers is not None or self.heads != "mean":
                raise ValueError("pairs of layer and head stand in place of layers and heads")
            self._heads = {layer: tuple(sorted(set(heads))) for layer, heads in self.pairs.items()}
            if not self._heads or not all(heads and heads[0] >= 0 for heads in self._heads.values()):
                raise ValueError(f"pairs name at least one head a layer, counted from 0, got {self.pairs}")
            self.layers = tuple(self._heads)
        self.paths = tuple(path for path in self.paths if path.bias != 0.0 and bool(path.queries.any()))
        # Where the first gated query of the batch stands: the device is waited for once a pass, and not once a layer.
        self.start = min((int(path.queries.any(0).float().argmax()) for path in self.paths), default=0)
        if self.layers is not None:
            if any(layer < 0 for layer in self.layers) and self.num_layers is None:
                raise ValueError("negative layer indices need num_layers")
            depth = self.num_layers or 0
            self.layers = frozenset(layer + depth if layer < 0 else layer for layer in self.layers)
            outside = [layer for layer in self.layers if layer < 0 or (self.num_layers is not None and layer >= depth)]
            if outside:
                raise ValueError(f"layers {sorted(outside)} lie outside a decoder of {depth} layers")

    def mean_rows(self) -> Tensor:
        """The rows averaged over the recorded layers (Eq. 2's mean over l and h): [B, R, S] or [B, H, R, S]."""
        if self._sum is not None:
            return self._sum / sum(self._weight(layer) for layer in self._summed)
        if not self.recorded:
            raise RuntimeError("no attention rows were recorded: the decoder does not run the 'laavit' implementation")
        if self._heads:
            weighted = [rows * self._weight(layer) for layer, rows in self.recorded.items()]
            return torch.stack(weighted).sum(0) / sum(self._weight(layer) for layer in self.recorded)
        return torch.stack(list(self.recorded.values())).mean(0)

    def part(self, segment: Segment, rows: Tensor | None, paths: tuple[GatePath, ...]) -> AttentionContext:
        """The context of one pass of several, which records what this one asks for."""
        layers = None if self.pairs is not None else self.layers
        kinds = (self.num_layers, self.heads, self.pairs, self.merged)
        return AttentionContext(paths, rows, layers, *kinds, segment=segment)

    def take(self, parts: Sequence[AttentionContext], join: Callable[[list[Tensor]], Tensor]) -> None:
        """Put together what the passes over parts of a sequence recorded; ``join`` does it for a layer's rows."""
        self.recorded = {layer: join([part.recorded[layer] for part in parts]) for layer in parts[0].recorded}
        if self.merged:
            self._sum, self._summed = join([part._sum for part in parts if part._sum is not None]), parts[0]._summed

    @property
    def goes_on(self) -> bool:
        """Whether the pass reads on after others: its masks hold the gate already."""
        return self.segment is not None and bool(self.segment.past)

    def paths_at(self, layer: int) -> tuple[GatePath, ...]:
        """The gate paths that act on a layer."""
        return tuple(path for path in self.paths if path.layers is None or layer in path.layers)

    def wants(self, layer: int) -> bool:
        return self.rows is not None and (self.layers is None or layer in self.layers)

    def chosen(self, layer: int, heads: int, device: torch.device) -> Tensor | None:
        """The selected heads of a layer that has ``heads``, long; None where all are."""
        if not self._heads:
            return None
        if self._heads[layer][-1] >= heads:
            raise ValueError(f"head {self._heads[layer][-1]} is selected, and layer {layer} has {heads} heads")
        return torch.tensor(self._heads[layer], device=device)

    def _weight(self, layer: int) -> int:
        """How many (layer, head) pairs a layer's rows stand for, against other layers."""
        return len(self._heads[layer]) if self._heads else 1

    def record(self, layer: int, weights: Tensor) -> None:
        """Keep a layer's rows [B, H, R, S]; of a layer that runs again under checkpointing the first ones stay."""
        if layer in self.recorded or layer in self._summed:
            return
        if self.merged and self._heads:
            rows = weights.sum(1)  # the pairs count alike, however many of them are in this layer
        else:
            rows = weights.mean(1) if self.heads == "mean" else weights
        if self.rows is not None:
            rows = rows.to(self.rows.device)
        if not self.merged:
            self.recorded[layer] = rows
            return
        self._summed.add(layer)
        if self._sum is None:
            self._sum = rows
        else:
            self._sum = self._sum + rows if self._sum.requires_grad or rows.requires_grad else self._sum.add_(rows)

    def bias_at(self, positions: Tensor, dtype: torch.dtype, layer: int) -> Tensor | None:
        """The summed bias of a layer's paths for the given queries [B, Q] -> [B, 1, Q, S]; None where it has none."""
        total = None
        for path in self.paths_at(layer):
            on = path.queries.gather(1, positions)[:, :, None] & path.keys[:, None, :]
            bias = torch.zeros(on.shape, dtype=dtype, device=on.device).masked_fill_(on, path.bias)
            total = bias if total is None else total + bias
        return None if total is None else total[:, None]

    def suffix_mask(self, mask: Tensor | None, query: Tensor, groups: int, layer: int) -> Tensor:
        """Causal mask plus bias for the queries from ``start`` on, built once a forward pass for layers of equal paths.

        Returns: [B, 1, groups * (S - start), S], the queries' rows repeated for ``groups`` heads that share a key head.
        """
        key = (id(mask), *map(id, self.paths_at(layer)))
        if key not in self._masks:
            batch, _, length, _ = query.shape
            positions = torch.arange(self.start, length, device=query.device).expand(batch, -1)
            bias = self.bias_at(positions, query.dtype, layer)
            assert bias is not None, "suffix_mask is called for gated layers only"
            # The mask is kept beside its id, so that the id cannot be reused by another tensor.
            total = _allowed(mask, positions, length, query.dtype) + bias
            self._masks[key] = (mask, total.repeat(1, 1, groups, 1) if groups > 1 else total)
        return self._masks[key][1]

    def segment_bias(self, columns: Tensor, dtype: torch.dtype, layer: int) -> Tensor | None:
        """Of a pass that goes on: the bias of a layer's paths for queries, given by column [B, R] -> [B, 1, R, C]."""
        assert self.segment is not None, "segment_bias is called for a part of a sequence"
        bias = self.bias_at(columns.clamp(min=0), dtype, layer)
        return None if bias is None else self.segment.bias(bias, columns)

    def segment_mask(self, window: int | None, dtype: torch.dtype, layer: int) -> Tensor:
        """Mask plus bias of a pass that goes on, [B, 1, Q, C], built once for layers of equal paths and windows."""
        assert self.segment is not None, "segment_mask is called for a part of a sequence"
        key = (window or 0, *map(id, self.paths_at(layer)))
        if key not in self._masks:
            total = self.segment.allowed(window, dtype)
            bias = self.segment_bias(self.segment.columns, dtype, layer)
            self._masks[key] = (None, total if bias is None else total + bias)
        return self._masks[key][1]


def _allowed(
    mask: Tensor | BlockMask | None, positions: Tensor, length: int, dtype: torch.dtype, past: int = 0
) -> Tensor:
    """The additive mask of the given queries, after ``past`` cached keys: 0 where they may look, -inf elsewhere.

    Returns: [B or 1, 1, Q, S].
    """
    if isinstance(mask, BlockMask):  # FlexAttention's: a function of indices, asked about these rows alone
        samples = torch.arange(len(positions), device=positions.device)[:, None, None, None]
        keys = torch.arange(length, device=positions.device)
        allowed = mask.mask_mod(samples, torch.zeros_like(samples), positions[:, None, :, None], keys)
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -math.inf)
    if mask is None:
        causal = torch.arange(length, device=positions.device) <= positions[:, None, :, None] + past
        return torch.zeros(causal.shape, dtype=dtype, device=positions.device).masked_fill_(~causal, -math.inf)
    batch, heads = positions.shape[0], mask.shape[1]
    mask = mask.expand(batch, heads, *mask.shape[2:])[..., :length]
    picked = mask.gather(2, positions[:, None, :, None].expand(batch, heads, -1, length))
    if picked.dtype == torch.bool:
        return torch.zeros(picked.shape, dtype=dtype, device=picked.device).masked_fill_(~picked, -math.inf)
    return picked.to(dtype)


def attention_rows(
    query: Tensor, key: Tensor, rows: Tensor, mask: Tensor | BlockMask | None, bias: Tensor | None, scaling: float
) -> Tensor:
    """Softmax rows of chosen queries (Eq. 2's A^{(l,h)}_{i,j} for i in ``rows``), without the full map.

    Args:
        query: [B, H, Q, D]. key: [B, H / G, S, D]; the queries are the last Q of S. rows: long [B, R], in 0 .. Q - 1.
        mask: the model's mask, bool or additive, [B or 1, 1, Q, S], or a block mask of all heads; None means causal.
        bias: additive [B, 1, R, S] or None.
        scaling: the score's factor, usually 1 / sqrt(D).

    Returns: [B, H, R, S]; at least float32.
    """
    batch, heads, _, width = query.shape
    key_heads, length = key.shape[1], key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    picked = query.gather(2, rows[:, None, :, None].expand(batch, heads, -1, width))
    grouped = picked.reshape(batch, key_heads, -1, width)  # [B, H/G, G*R, D]: the keys are not repeated
    added = _allowed(mask, rows, length, dtype, length - query.shape[2])
    # In place: the scores are the largest tensor here, and nothing before the softmax needs them for its gradient.
    scores = (grouped @ key.transpose(-1, -2)).to(dtype).mul_(scaling).reshape(batch, heads, -1, length)
    return scores.add_(added if bias is None else added + bias).softmax(-1)


def record_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | BlockMask | None,
    scaling: float | None,
    context: AttentionContext,
) -> int:
    """Record what a context asks of a layer, its gate included; returns the layer's index.

    Args:
        query: [B, H, S, D]. key: [B, H / G, S, D]. mask: the model's, or None (causal).

    Raises:
        ValueError: a gate is asked for while keys come from a cache (queries and keys differ in length).
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if context.paths and not context.goes_on and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"a gate works on whole sequences, got {query.shape[2]} queries for {key.shape[2]} keys: "
            "run the forward pass without a key-value cache"
        )
    if not context.wants(layer):
        return layer
    assert context.rows is not None
    rows = context.rows.clamp(min=0).to(query.device)  # a model may be spread over devices
    factor = scaling if scaling is not None else query.shape[-1] ** -0.5
    exact = torch.promote_types(query.dtype, torch.float32)
    if context.goes_on:  # an additive mask of such a pass holds the gate; a block mask cannot
        assert context.segment is not None
        columns = context.segment.columns.gather(1, rows)
        bias = context.segment_bias(columns, exact, layer) if isinstance(mask, BlockMask) else None
    else:
        bias = context.bias_at(rows, exact, layer)
    heads = context.chosen(layer, query.shape[1], query.device)
    if heads is not None:
        if isinstance(mask, Tensor) and mask.shape[1] > 1:
            mask = mask[:, heads]
        key = key[:, heads // (query.shape[1] // key.shape[1])]
        query = query[:, heads]
    # A recomputed layer must save the same tensors, so the rows are always computed; the first ones are kept.
    context.record(layer, attention_rows(query, key, rows, mask, bias, factor))
    return layer


def gated_suffix(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, dropout: float
) -> Tensor:
    """Masked attention of a few last queries, whose heads share key heads: keys and values are not repeated.

    Args:
        query: [B, H, Q, D]. key, value: [B, H / G, S, D]. mask: additive, [B, 1, G * Q, S].

    Returns: [B, Q, H, D].
    """
    batch, heads, count, width = query.shape
    packed = query.reshape(batch, key.shape[1], -1, width)
    out = nn.functional.scaled_dot_product_attention(packed, key, value, mask, dropout_p=dropout, scale=scaling)
    return out.reshape(batch, heads, count, -1).transpose(1, 2)


@torch.compiler.disable
@per_sample
def laavit_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    laavit: AttentionContext | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface with a gate and recorded rows; see the module's docstring.

    Args:
        query: [B, H, S, D]. key, value: [B, H / G, S, D]. attention_mask: as transformers makes it, or None (causal).
        laavit: the context of this forward pass; None is plain SDPA.

    A compiled block (``train.compile``) leaves this function as it is: a context is Python's, with tables by layer and
    by the identity of masks, and would be compiled anew for each layer.

    Raises:
        ValueError: a gate is asked for while keys come from a cache (queries and keys differ in length).
    """

    def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,  # type: ignore[arg-type]
        )[0]

    if laavit is None:
        return plain(query, key, value, attention_mask), None
    if laavit.segment is not None:
        key, value = laavit.segment.joined(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    if laavit.goes_on:
        window: int | None = kwargs.get("sliding_window")  # type: ignore[assignment]
        mask = laavit.segment_mask(window, query.dtype, int(module.layer_idx))  # type: ignore[arg-type]
        record_rows(module, query, key, mask, scaling, laavit)
        mask = mask.repeat(1, 1, query.shape[1] // key.shape[1], 1)
        return gated_suffix(query, key, value, mask, scaling, dropout), None
    layer = record_rows(module, query, key, attention_mask, scaling, laavit)
    if not laavit.paths_at(layer):
        return plain(query, key, value, attention_mask), None
    start = laavit.start
    shared = attention_mask is None or attention_mask.shape[1] == 1  # one mask for all heads, as transformers makes it
    groups = query.shape[1] // key.shape[1] if shared else 1
    suffix = laavit.suffix_mask(attention_mask, query, groups, layer)
    last = query[:, :, start:]
    after = gated_suffix(last, key, value, suffix, scaling, dropout) if shared else plain(last, key, value, suffix)
    if start == 0:
        return after, None
    if attention_mask is None:
        before = plain(query[:, :, :start], key[:, :, :start], value[:, :, :start], None)
    else:  # a mask may let queries look ahead (Gemma 3's image tokens see all of their image), past ``start`` too
        before = plain(query[:, :, :start], key, value, attention_mask[:, :, :start])
    return torch.cat([before, after], dim=1), None


def register() -> str:
    """Register the implementation with transformers (idempotent) and return its name."""
    AttentionInterface.register(IMPLEMENTATION, laavit_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    return IMPLEMENTATION


register()
