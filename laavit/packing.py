"""Packed batches: samples of unequal length read as one row, without padding.

Norms, projections, MLPs and experts work on positions one by one, and read the row. Attention works on samples: there a
row's queries, keys and values are laid out as samples again, padded behind, so that no position can see another
sample's whatever a gate or recorded rows ask for, and causal attention needs no mask (others have one a sample, as
padded batches do). A block mask of the row would be T x T; this costs copies of O(T * D) a layer, and attention over
the padding behind samples that are shorter than the longest. Positions (M-RoPE's, too) are those of each sample.

Shapes: ``B`` samples, ``Q`` columns of the longest, ``T`` positions of the row, the sum of their lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

import torch
from torch import Tensor, nn

from laavit.registry import UserError


@dataclass(frozen=True)
class Packing:
    """Where the positions of a row stand in the batch that it is made of.

    Args:
        owners: long [T], the sample of each position, in order. columns: long [T], its column there.
        shape: (B, Q).
    """

    owners: Tensor
    columns: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, used: Tensor) -> Packing:
        """The row of all positions that are used, bool [B, Q]."""
        owners, columns = used.nonzero().unbind(1)
        return cls(owners, columns, (used.shape[0], used.shape[1]))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Packing:
        """The same with other tensors (on a device, in pinned memory)."""
        return Packing(change(self.owners), change(self.columns), self.shape)

    @cached_property
    def places(self) -> Tensor:
        """Long [T], the positions' places in the flattened batch."""
        return self.owners * self.shape[1] + self.columns

    def pack(self, values: Tensor) -> Tensor:
        """[B, Q, ...] -> [1, T, ...]."""
        return values.flatten(0, 1).index_select(0, self.places)[None]

    def pack_ids(self, values: Tensor) -> Tensor:
        """[..., B, Q] -> [..., 1, T]."""
        return values.flatten(-2).index_select(-1, self.places).unsqueeze(-2)

    def unpack(self, row: Tensor) -> Tensor:
        """[1, T, ...] -> [B, Q, ...], zero where nothing is used."""
        # Every place is written once, so that the way back is a selection, without sums whose order varies.
        laid = row.new_zeros(self.shape[0] * self.shape[1], *row.shape[2:])
        return laid.index_copy(0, self.places, row[0]).unflatten(0, self.shape)


def no_mask(device: torch.device) -> Tensor:
    """What is given to a decoder in place of a mask, so that it builds none: samples that are laid out need none."""
    return torch.empty(1, 1, 0, 0, device=device)


def per_sample(attention: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    """An attention function of transformers' interface that reads a packed row sample by sample.

    Args:
        attention: its argument ``laavit`` is a context whose ``packing`` says how a row is laid out; None: it is none.
    """

    @wraps(attention)
    def laid_out(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        packing: Packing | None = getattr(kwargs.get("laavit"), "packing", None)
        if packing is None:
            return attention(module, query, key, value, attention_mask, **kwargs)
        mask = None if isinstance(attention_mask, Tensor) and attention_mask.numel() == 0 else attention_mask
        window = kwargs.get("sliding_window")
        if mask is None and window is not None and window < packing.shape[1] and not kwargs["laavit"].goes_on:
            raise UserError(
                f"train.packing: a decoder layer looks back {window} positions and no further, and a sample has "
                f"{packing.shape[1]}; packed samples have no mask that says so: take packing 'none'"
            )
        query, key, value = (
            packing.unpack(states.transpose(1, 2)).transpose(1, 2) for states in (query, key, value)
        )  # [1, H, T, D] -> [B, H, Q, D]
        found, _ = attention(module, query, key, value, mask, **kwargs)
        return packing.pack(found), None

    return laid_out
