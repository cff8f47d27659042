"""Semantic reconstruction (LaViT, Sec. 4.2.2, Eq. 6): a latent's state is led to the teacher's image semantics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laavit.registry import TARGETS, UserError, nearest
from laavit.structures import Encoded, Role, StudentOutput, Trace
from laavit.targets.base import Target
from laavit.traces.semantics import POOLINGS, pool

ANCHORS = ("last", "mean", "all")


def concept_loss(predicted: Tensor, semantics: Tensor) -> Tensor:
    """L_concept = 1 - cos(phi(h_z), V_sem), averaged (Eq. 6).

    Args:
        predicted: phi(h_z), [..., D_t]. semantics: V_sem, broadcastable to it.
    """
    return (1.0 - F.cosine_similarity(predicted, semantics, dim=-1)).mean()


@TARGETS.register_module()
class ConceptTarget(Target):
    """1 - cos(phi(h_z), V_sem), phi a two-layer MLP (Linear-GELU-Linear, App. C.2).

    Args:
        weight: lambda.
        anchor: which latents are h_z: the 'last' (App. C.2), their 'mean', or 'all' of them, each by itself.
        hidden: width of phi's middle; None is the student's own.
        pooling: how V_sem is made of traces that hold rows (extract.semantics 'top_k_rows' or 'full'): 'gaze_top_k'
            (weighted by the strongest gaze), 'gaze' (by all of it) or 'mean', over the rows there are. Traces whose
            semantics are pooled already are taken as they are.
        top_k: how many tokens 'gaze_top_k' keeps (paper: 8).
    """

    def __init__(
        self,
        weight: float = 0.3,
        anchor: str = "last",
        hidden: int | None = None,
        pooling: str = "gaze_top_k",
        top_k: int = 8,
    ) -> None:
        super().__init__(weight)
        if anchor not in ANCHORS:
            raise UserError(f"anchor: got '{anchor}'; {nearest(anchor, ANCHORS)}")
        if pooling not in POOLINGS:
            raise UserError(f"pooling: got '{pooling}'; {nearest(pooling, POOLINGS)}")
        if top_k < 1:
            raise UserError(f"top_k is at least 1, got {top_k}")
        self.anchor, self.hidden, self.pooling, self.top_k = anchor, hidden, pooling, top_k
        self.head: nn.Module = nn.Identity()

    def setup(self, width: int, depth: int, latents: int, header: Mapping[str, Any]) -> None:
        if latents == 0:
            raise UserError("the concept target reads the latents' states, and this recipe has no latents")
        if "width" not in header:
            raise UserError("the concept target needs traces: give traces.path (tools/extract.py makes them)")
        middle = self.hidden or width
        self.head = nn.Sequential(nn.Linear(width, middle), nn.GELU(), nn.Linear(middle, int(header["width"])))

    def prepare(self, encoded: Encoded, trace: Trace | None) -> dict[str, Tensor]:
        assert trace is not None, "the data set hands a trace to every target that needs one"
        semantics = trace.semantics.float()
        if semantics.ndim == 2:
            semantics = pool(semantics, trace.gaze, self.pooling, self.top_k, trace.semantic_tokens)
        return {"semantics": semantics}

    def forward(self, output: StudentOutput, roles: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        latent = roles == Role.LATENT
        states = output.hidden[latent].view(roles.shape[0], -1, output.hidden.shape[-1])  # [B, K, D]
        if self.anchor == "last":
            states = states[:, -1:]
        elif self.anchor == "mean":
            states = states.mean(1, keepdim=True)
        weight = next(self.head.parameters())
        predicted = self.head(states.to(weight.dtype))
        kind = torch.promote_types(predicted.dtype, torch.float32)
        return concept_loss(predicted.to(kind), prepared["semantics"].to(kind)[:, None])
