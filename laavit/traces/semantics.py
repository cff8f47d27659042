"""V_sem (LaViT, Sec. 4.1): the teacher's states at the image tokens, pooled by its gaze or kept as rows.

Pure functions: the extraction calls them on a teacher's states, a target on the rows of a store. In a causal decoder
with the image before the question the states cannot depend on the question; which of them the gaze prefers can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laavit.registry import UserError, nearest
from laavit.traces.gaze import normalise, to_distribution, top_k, top_k_indices

POOLINGS = ("gaze_top_k", "gaze", "mean")
ROWS = ("top_k_rows", "full")
SEMANTICS = (*POOLINGS, *ROWS)


def pool(states: Tensor, gaze: Tensor, pooling: str, k: int = 8, tokens: Tensor | None = None) -> Tensor:
    """States of image tokens weighted by the gaze (Eq. 3), by its k strongest entries, or their mean -> [D].

    A gaze that prefers none of the tokens (one token, or a constant map) gives the mean.

    Args:
        states: [M, D]. gaze: [N], the whole map. tokens: long [M], whose states they are; None is all, in order.

    Raises:
        UserError: no such pooling.
    """
    if pooling not in POOLINGS:
        raise UserError(f"no pooling of semantics is called '{pooling}'; {nearest(pooling, POOLINGS)}")
    weights = normalise(gaze)
    if pooling == "gaze_top_k":
        weights = top_k(weights, k)
    if tokens is not None:
        weights = weights[tokens]
    if pooling == "mean" or not bool(weights.any()):
        return states.mean(0)
    return to_distribution(weights).to(states.dtype) @ states


def select(states: Tensor, gaze: Tensor, semantics: str, k: int = 8) -> tuple[Tensor, Tensor | None]:
    """V_sem as the settings say, from all image states [N, D] and their gaze [N].

    Returns: a pooled vector [D] and None; or rows [M, D] and the image tokens, long [M], that they are states of
    ('top_k_rows': strongest gaze first, 'full': all in order).

    Raises:
        UserError: no such kind of semantics.
    """
    if semantics == "full":
        return states, torch.arange(len(states), device=states.device)
    if semantics == "top_k_rows":
        tokens = top_k_indices(gaze, k)
        return states[tokens], tokens
    if semantics not in POOLINGS:
        raise UserError(f"no kind of semantics is called '{semantics}'; {nearest(semantics, SEMANTICS)}")
    return pool(states, gaze, semantics, k), None
