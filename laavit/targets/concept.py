"""Semantic reconstruction (LaViT, Sec. 4.2.2, Eq. 6): the latents' states are led to the teacher's image semantics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laavit.backbones.rows import positions
from laavit.registry import TARGETS, UserError, nearest
from laavit.structures import Encoded, Role, StudentOutput, Trace
from laavit.targets.base import Target
from laavit.targets.controls import STATE_CONTROLS, check_control, shuffled_cells
from laavit.targets.losses import STATE_LOSSES, cosine, info_nce, over_rows
from laavit.traces.gaze import top_k_indices
from laavit.traces.semantics import POOLINGS, ROWS, pool

ANCHORS = ("last", "mean", "all")
MATCHES = ("none", "order", "hungarian")
LOSSES = (*STATE_LOSSES, "info_nce")


def concept_loss(predicted: Tensor, semantics: Tensor) -> Tensor:
    """L_concept = 1 - cos(phi(h_z), V_sem), averaged (Eq. 6).

    Args:
        predicted: phi(h_z), [..., D_t]. semantics: V_sem, broadcastable to it.
    """
    return cosine(predicted, semantics).mean()


def latent_states(output: StudentOutput, roles: Tensor) -> tuple[Tensor, Tensor]:
    """The states of each sample's latents in order, [B, K, D], and which are no padding, bool [B, K].

    K is the largest number of latents in the batch; samples with fewer are padded behind.
    """
    index = positions(roles == Role.LATENT)
    picked = index.clamp(min=0)[..., None].expand(-1, -1, output.hidden.shape[-1])
    return output.hidden.gather(1, picked), index >= 0


def anchored(states: Tensor, valid: Tensor, anchor: str) -> tuple[Tensor, Tensor]:
    """h_z of [B, K, D] and bool [B, K]: each sample's 'last' state or their 'mean', [B, 1, D], or 'all' of them."""
    if anchor == "all":
        return states, valid
    count = valid.sum(1)[:, None, None]
    if anchor == "last":
        found = states.gather(1, (count - 1).expand(-1, -1, states.shape[-1]))
    else:
        found = states.masked_fill(~valid[..., None], 0.0).sum(1, keepdim=True) / count
    return found, valid[:, :1]


def hungarian(predicted: Tensor, valid: Tensor, rows: Tensor, present: Tensor, loss: str) -> Tensor:
    """A row for each prediction, no row twice, so that the losses' sum is least; no gradient goes through the choice.

    Args:
        predicted: [B, K, D], those that count ``valid``, bool [B, K]. rows: [B, M, D], M >= K of each sample
            ``present``, bool [B, M]. loss: of ``STATE_LOSSES``; any other name matches by cosine.

    Returns: [B, K, D], zero where a prediction is padding.
    """
    from scipy.optimize import linear_sum_assignment  # half a second, for one of the ways to match

    measure = STATE_LOSSES.get(loss, cosine)
    chosen = torch.zeros_like(predicted)
    for place, (given, counts, own, real) in enumerate(zip(predicted.detach(), valid, rows, present, strict=True)):
        given, own = given[counts], own[real]
        cost = torch.stack([measure(each[None].expand_as(own), own) for each in given])  # [K, M]
        _, columns = linear_sum_assignment(cost.double().cpu().numpy())
        chosen[place, : len(given)] = own[torch.from_numpy(columns).to(own.device)]
    return chosen


@TARGETS.register_module()
class ConceptTarget(Target):
    """1 - cos(phi(h_z), V_sem), phi a two-layer MLP (Linear-GELU-Linear, App. C.2).

    Where the number of latents varies, a sample's own count, and each sample as much as any other.

    Args:
        weight: lambda.
        anchor: which latents are h_z: the 'last' (App. C.2), their 'mean', or 'all' of them, each by itself.
        hidden: width of phi's middle; None is the student's own.
        pooling: how V_sem is made of traces that hold rows (extract.semantics 'top_k_rows' or 'full'): 'gaze_top_k'
            (weighted by the strongest gaze), 'gaze' (by all of it) or 'mean', over the rows there are. Traces whose
            semantics are pooled already are taken as they are.
        top_k: how many tokens 'gaze_top_k' keeps (paper: 8), and how many rows are matched.
        loss: 'cosine' (Eq. 6), 'mse', 'smooth_l1', or 'info_nce' (negatives from the batch).
        temperature: of InfoNCE.
        match: 'none' leads every anchor to the pooled V_sem; the others lead each of 'all' latents to a row of its own
            among the ``top_k`` of strongest gaze: 'order', latent j to the j-th strongest, or 'hungarian', where the
            losses' sum is least. They need traces that hold rows.
        static: whether the traces must be a static encoder's (timm, open_clip): embeddings that saw no question.
        store: a trace store of its own, in place of traces.path: semantics and gaze can then be of two teachers.
        control: 'shuffled' (another sample's semantics), 'wrong_image' (of another image), 'random' (the components in
            an order of their own in every sample), or 'none'. seed: fixes the control's choices.
    """

    needs_latents = True

    def __init__(
        self,
        weight: float = 0.3,
        anchor: str = "last",
        hidden: int | None = None,
        pooling: str = "gaze_top_k",
        top_k: int = 8,
        loss: str = "cosine",
        temperature: float = 0.07,
        match: str = "none",
        static: bool = False,
        store: str | None = None,
        control: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__(weight)
        for name, value, allowed in (
            ("anchor", anchor, ANCHORS),
            ("pooling", pooling, POOLINGS),
            ("loss", loss, LOSSES),
            ("match", match, MATCHES),
        ):
            if value not in allowed:
                raise UserError(f"{name}: got '{value}'; {nearest(value, allowed)}")
        if top_k < 1:
            raise UserError(f"top_k is at least 1, got {top_k}")
        if not temperature > 0:
            raise UserError(f"temperature is above 0, got {temperature}")
        if match != "none" and anchor != "all":
            raise UserError(
                f"match: '{match}' leads each latent to a row of its own, so anchor is 'all', got '{anchor}'"
            )
        self.anchor, self.hidden, self.pooling, self.top_k = anchor, hidden, pooling, top_k
        self.loss, self.temperature, self.match = loss, temperature, match
        self.min_batch = 2 if loss == "info_nce" else 1
        self.static, self.store = static, store
        self.control, self.seed = check_control(control, STATE_CONTROLS), seed
        self.latents = 0
        self.head: nn.Module = nn.Identity()

    def setup(self, width: int, depth: int, latents: int, header: Mapping[str, Any]) -> None:
        if latents == 0:
            raise UserError("the concept target reads the latents' states, and this recipe has no latents")
        if "width" not in header:
            raise UserError("the concept target needs traces: give traces.path (tools/extract.py makes them)")
        if self.static and "static" not in header:
            raise UserError(
                f"static: these traces were made by '{header.get('teacher')}', which is no static encoder; extract "
                "with a timm or open_clip encoder of registry/teachers, and name its traces as store"
            )
        if self.match != "none":
            self._check_rows(latents, header.get("settings", {}))
        self.latents = latents
        middle = self.hidden or width
        self.head = nn.Sequential(nn.Linear(width, middle), nn.GELU(), nn.Linear(middle, int(header["width"])))

    def _check_rows(self, latents: int, extracted: Mapping[str, Any]) -> None:
        """Whether the traces hold a row for each latent."""
        semantics = extracted.get("semantics")
        if semantics not in ROWS:
            raise UserError(
                f"match: '{self.match}' leads each latent to a row of its own, and these traces hold pooled semantics "
                f"({semantics}); extract with extract.semantics top_k_rows or full"
            )
        rows = min(self.top_k, extracted.get("top_k", self.top_k)) if semantics == "top_k_rows" else self.top_k
        if rows < latents:
            raise UserError(
                f"match: {latents} latents need as many rows, and top_k leaves {rows} of them (targets: {self.top_k}, "
                f"extract: {extracted.get('top_k')})"
            )

    def prepare(self, encoded: Encoded, trace: Trace | None) -> dict[str, Tensor]:
        """``semantics``: [D_t]; or the rows to be matched, by falling gaze, [M, D_t], and ``present``, bool [M]."""
        assert trace is not None, "the data set hands a trace to every target that needs one"
        semantics, prepared = trace.semantics.float(), {}
        if self.match != "none":
            semantics = self._strongest(trace, semantics)
            prepared["present"] = torch.ones(len(semantics), dtype=torch.bool)
        elif semantics.ndim == 2:
            semantics = pool(semantics, trace.gaze, self.pooling, self.top_k, trace.semantic_tokens)
        if self.control == "random":
            semantics = shuffled_cells(semantics, self.seed, encoded.sample.id)
        return {"semantics": semantics, **prepared}

    def _strongest(self, trace: Trace, rows: Tensor) -> Tensor:
        """The rows of the ``top_k`` tokens with the strongest gaze."""
        gaze = trace.gaze if trace.semantic_tokens is None else trace.gaze[trace.semantic_tokens]
        if rows.ndim != 2 or len(rows) < self.latents:
            raise UserError(
                f"the trace of sample '{trace.sample_id}' cannot be a target: {self.latents} latents need as many rows "
                f"of semantics, and it holds {len(rows) if rows.ndim == 2 else 'pooled ones'}"
            )
        return rows[top_k_indices(gaze, self.top_k)]

    def forward(self, output: StudentOutput, roles: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        states, valid = anchored(*latent_states(output, roles), self.anchor)
        weight = next(self.head.parameters())
        predicted = self.head(states.to(weight.dtype))
        kind = torch.promote_types(predicted.dtype, torch.float32)
        predicted, semantics = predicted.to(kind), prepared["semantics"].to(kind)
        if self.match == "none":
            semantics = semantics[:, None]
        elif self.match == "order":
            semantics = semantics[:, : predicted.shape[1]]
        else:
            semantics = hungarian(predicted, valid, semantics, prepared["present"], self.loss)
        if self.loss != "info_nce":
            losses = STATE_LOSSES[self.loss](predicted, semantics)
        elif self.match == "none":
            losses = info_nce(predicted, semantics, self.temperature)
        else:
            losses = info_nce(predicted, semantics, self.temperature, valid)
            valid = valid & (valid.sum(0) > 1)  # a latent that no other sample has is without a negative
        return over_rows(losses, valid, per_row_mean=True)
