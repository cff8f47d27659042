"""A sequence read in several passes: keys and values of the passes before, kept by the attention function.

Latents that are fed back (laavit/backbones/unrolling.py) are read one after another. transformers' key-value cache
serves generation; in training it does not, for its layers drop it under gradient checkpointing. What the attention
function puts aside here survives: a layer that runs again finds the tensors of the first run, which carry the
gradient, as recorded rows do.

Shapes: ``B`` batch, ``Q`` queries of a pass, ``C`` keys up to its end (its own the last Q), ``R`` recorded rows,
``S`` columns of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Segment:
    """The columns of a batch that one pass reads, after others.

    Args:
        columns: long [B, Q], where each query stands in its sample; -1 pads: such a query sees its sample's first
            column, and nobody sees it.
        past: the passes before it, in order; () for the first, whose mask is the model's own.
        owners: where the pass reads beginnings that samples share, long [B]: the row of ``columns`` [P, Q] that is each
            sample's. Its keys and values are put aside once a sample.
    """

    columns: Tensor
    past: tuple[Segment, ...] = ()
    owners: Tensor | None = None
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    keys: Tensor = field(init=False, repr=False)  # long [B, C], the columns of the keys up to its end

    def __post_init__(self) -> None:
        self.keys = torch.cat([*(segment.each for segment in self.past), self.columns], 1)

    @property
    def each(self) -> Tensor:
        """The columns as every sample of the batch has them, long [B, Q]."""
        return self.columns if self.owners is None else self.columns[self.owners]

    def joined(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's keys and values [B, H / G, Q, D]; all up to here come back, [B, H / G, C, D].

        Of a layer that runs again under checkpointing the first ones stay.
        """
        # A layer that runs again must save the same tensors, so each sample's are picked in any case.
        each = (key, value) if self.owners is None else (key[self.owners], value[self.owners])
        self.kept.setdefault(layer, each)
        if not self.past:
            return key, value
        before = [segment.kept[layer] for segment in self.past]
        return torch.cat([*(k for k, _ in before), key], 2), torch.cat([*(v for _, v in before), value], 2)

    def allowed(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """The additive mask [B, 1, Q, C]: 0 where a query may look, -inf elsewhere.

        Args:
            window: how many columns a sliding layer looks back, its own included; None is all.
        """
        queries, keys = self.columns.clamp(min=0)[:, :, None], self.keys[:, None]
        hidden = (keys < 0) | (keys > queries)
        if window is not None:
            hidden |= queries - keys >= window
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)[:, None]

    def bias(self, bias: Tensor, columns: Tensor) -> Tensor:
        """A gate's bias by columns, [B, 1, Q, S], for this pass's keys: [B, 1, Q, C]; none for padding.

        Args:
            columns: of the queries, long [B, Q]; -1 pads.
        """
        found = bias.gather(3, self.keys.clamp(min=0)[:, None, None].expand(-1, 1, bias.shape[2], -1))
        return found.masked_fill((columns < 0)[:, None, :, None], 0.0)


def segments(columns: Sequence[Tensor], owners: Tensor | None = None) -> list[Segment]:
    """The passes over parts of a batch, long [B, Q] each, in the order in which they are read.

    Args:
        owners: of the first part, where samples share it: see ``Segment``.
    """
    found: list[Segment] = []
    for part in columns:
        found.append(Segment(part, tuple(found), None if found else owners))
    return found


def places(parts: Sequence[Segment], length: int) -> Tensor:
    """Where each column of a batch stands when the passes' results follow one another: long [B, length].

    Columns that no pass reads, padding, are given place 0.
    """
    columns = torch.cat([segment.each for segment in parts], 1)
    index = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
    spare = torch.where(columns < 0, length, columns)  # pads go to a column of their own, which is cut off
    return torch.zeros(len(columns), length + 1, dtype=torch.long, device=columns.device).scatter(1, spare, index)[
        :, :length
    ]


def joined_rows(
    rows: Sequence[Tensor], parts: Sequence[Segment], index: Sequence[Tensor], count: int, length: int
) -> Tensor:
    """Attention rows that were recorded pass by pass, as one pass over all columns records them.

    Args:
        rows: [B, R_i, C_i] of each pass, or [B, H, R_i, C_i]. index: long [B, R_i], which rows they are; -1 pads.
        count: R. length: S.

    Returns: [B, R, S], or [B, H, R, S].
    """
    lead = rows[0].shape[:-2]
    total = rows[0].new_zeros(*lead, count + 1, length + 1)
    for found, segment, own in zip(rows, parts, index, strict=True):
        ones = (1,) * (len(lead) - 1)
        keys = torch.where(segment.keys < 0, length, segment.keys).view(len(own), *ones, 1, -1)
        wide = found.new_zeros(*found.shape[:-1], length + 1).scatter(-1, keys.expand_as(found), found)
        where = torch.where(own < 0, count, own).view(len(own), *ones, -1, 1)
        total = total.scatter(-2, where.expand_as(wide), wide)
    return total[..., :count, :length]
