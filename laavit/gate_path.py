"""One way from queries to keys on which a gate lies."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GatePath:
    """Adds ``bias`` to the scores from the queries to the keys that the masks select.

    Args:
        queries: bool [B, S], the positions that look.
        keys: bool [B, S], the positions that are looked at.
        bias: ``ln(gamma)``; ``-inf`` closes the path, ``0`` leaves it open.
        layers: the decoder layers it acts on, counted from 0; None is all.
    """

    queries: Tensor
    keys: Tensor
    bias: float
    layers: frozenset[int] | None = None

    def __post_init__(self) -> None:
        if self.queries.shape != self.keys.shape or self.queries.ndim != 2:
            raise ValueError(
                f"a gate path needs queries and keys of one shape [B, S], got {tuple(self.queries.shape)} "
                f"and {tuple(self.keys.shape)}"
            )
        if math.isnan(self.bias) or self.bias > 0:
            raise ValueError(f"a gate path's bias is ln(gamma) <= 0, got {self.bias}")
