"""The answer's cross-entropy (L_ntp of Eq. 9): from all logits at once, or without ever holding them all.

With M labelled positions and a vocabulary of V, whole logits and what their loss keeps are several times 4 M V bytes
(M = 2,048 and V = 151,936: 1.2 GB each). Part by part it is that of one part; the price is the head's product once
more in the backward pass.

Shapes: ``M`` labelled positions, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

#: states [M, D], labels long [M] and the output head -> their mean loss, a scalar
TokenLoss = Callable[[Tensor, Tensor, nn.Module], Tensor]


def next_token_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Mean (or sum) of the cross-entropy of [M, V] and long [M], at least in float32: a scalar."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction=reduction)


def part_by_part(states: Tensor, labels: Tensor, head: nn.Module, rows: int) -> Tensor:
    """``next_token_loss`` of ``head(states)``, with the logits of ``rows`` positions alone in memory at any time."""

    def summed(states: Tensor, labels: Tensor) -> Tensor:
        return next_token_loss(head(states), labels, "sum")

    parts = zip(states.split(rows), labels.split(rows), strict=True)
    return torch.stack([checkpoint(summed, *part, use_reentrant=False) for part in parts]).sum() / len(labels)


def liger_loss(states: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """The same by Liger's fused kernel (arXiv 2410.10989), which works gradients out as it goes; on a GPU."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    given: Any = head
    return LigerFusedLinearCrossEntropyLoss()(given.weight, states, labels, getattr(head, "bias", None))
