"""Gaze maps: LaViT (arXiv 2601.10129) Eq. 2-3, Top-K, and the attention statistics of its Table 2.

Pure functions of tensors; the last dimension is always the ``N`` image tokens, any leading dimensions are a batch.
Shapes: ``R`` recorded rows, ``N`` image tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def aggregate(rows: Tensor) -> Tensor:
    """Eq. 2: ``S_j``, the mean of the attention rows over the text tokens: [..., R, N] -> [..., N].

    The rows come averaged over heads and layers (the means commute), restricted to the image tokens.
    """
    if rows.ndim < 2 or rows.shape[-2] == 0 or rows.shape[-1] == 0:
        raise ValueError(f"rows have the shape [..., R, N] with R, N >= 1, got {tuple(rows.shape)}")
    return rows.mean(-2)


def normalise(scores: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Eq. 3: ``(S_j - min S) / (max S - min S + epsilon)``: [..., N] -> [..., N] in [0, 1).

    The paper names no epsilon. A constant map becomes all zeros: it says nothing about where to look.
    """
    if epsilon <= 0:
        raise ValueError(f"epsilon is positive, got {epsilon}")
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    return (scores - low) / (high - low + epsilon)


def top_k_indices(gaze: Tensor, k: int) -> Tensor:
    """The k greatest entries' indices, greatest first, ties by lowest index: [..., N] -> long [..., min(k, N)]."""
    if k < 1:
        raise ValueError(f"k is at least 1, got {k}")
    # torch.topk leaves the order of ties open; a stable sort does not.
    return torch.sort(gaze, dim=-1, descending=True, stable=True).indices[..., :k]


def top_k(gaze: Tensor, k: int) -> Tensor:
    """Keep the k greatest entries, zero elsewhere (Sec. 4.1, k = 8); identity for k >= N: [..., N] -> [..., N]."""
    if k >= gaze.shape[-1]:
        return gaze
    keep = torch.zeros_like(gaze, dtype=torch.bool).scatter_(-1, top_k_indices(gaze, k), True)
    return torch.where(keep, gaze, torch.zeros_like(gaze))


def to_distribution(gaze: Tensor) -> Tensor:
    """``m / sum(m)``: [..., N] -> [..., N], each map summing to 1, as the KL of Eq. 7 needs.

    Raises:
        ValueError: a map is all zero, or has negative or non-finite entries. Costs one host synchronisation.
    """
    total = gaze.sum(-1, keepdim=True)
    fine = (gaze.detach() >= 0).all() & torch.isfinite(total.detach()).all()
    if not bool(fine):
        raise ValueError("a gaze map has negative or non-finite entries and is no distribution")
    if not bool((total.detach() > 0).all()):
        raise ValueError("a gaze map is zero everywhere and cannot be made a distribution")
    return gaze / total


def entropy(gaze: Tensor) -> Tensor:
    """``H = -sum p log p`` in nats of the map as a distribution, ``0 log 0 = 0``: [..., N] -> [...] (Table 2)."""
    share = to_distribution(gaze)
    # The inner where keeps log(0) out of the backward pass, where 0 * inf would be NaN.
    logs = torch.where(share > 0, share, torch.ones_like(share)).log()
    return -(share * logs).sum(-1)


def salient_regions(gaze: Tensor, factor: float = 1.5) -> Tensor:
    """How many patches lie above ``factor`` times the map's mean: [..., N] -> long [...] (Table 2)."""
    return (gaze > factor * gaze.mean(-1, keepdim=True)).sum(-1)


def cv(gaze: Tensor) -> Tensor:
    """Coefficient of variation ``sigma / mu``, sigma over all N patches (no Bessel correction): [..., N] -> [...]."""
    mean = gaze.mean(-1)
    if not bool((mean.detach() > 0).all()):
        raise ValueError("the coefficient of variation needs maps with a positive mean")
    return gaze.std(-1, correction=0) / mean
