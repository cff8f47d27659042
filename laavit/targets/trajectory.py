"""Trajectory alignment (LaViT, Sec. 4.2.2, Eq. 7): the latents look where the teacher looked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laavit.backbones.rows import check_kinds, image_rows
from laavit.registry import TARGETS, UserError
from laavit.structures import Encoded, StudentOutput, Trace
from laavit.targets.base import Target
from laavit.traces.gaze import normalise, to_distribution, top_k
from laavit.traces.grids import resample


def trajectory_loss(target: Tensor, student: Tensor, valid: Tensor, per_row_mean: bool = False) -> Tensor:
    """L_traj = mean over the batch of sum_j KL(A_traj || A_student,j) (Eq. 7).

    Args:
        target: A_traj, non-negative, sums to 1 over N: [B, N] (one map for all rows) or [B, R, N].
        student: attention of each row to the image tokens, not yet renormalised: [B, R, N].
        valid: bool [B, R], rows that are no padding.
        per_row_mean: divide each sample's sum by its number of rows (for kinds of rows whose number varies).

    Both sides are distributions over the image tokens: ``student`` is renormalised here. 0 log 0 is 0.
    """
    target = target if target.ndim == 3 else target[:, None]
    tiny = torch.finfo(student.dtype).tiny
    total = student.sum(-1, keepdim=True).clamp(min=tiny)
    log_student = (student.clamp(min=tiny) / total).log()
    divergence = (torch.xlogy(target, target) - target * log_student).sum(-1)  # [B, R]
    summed = divergence.masked_fill(~valid, 0.0).sum(-1)
    if per_row_mean:
        summed = summed / valid.sum(-1).clamp(min=1)
    return summed.mean()


@TARGETS.register_module()
class TrajectoryTarget(Target):
    """sum_j KL(A_traj || A_student,j) against the teacher's gaze, resampled to the student's grid, Top-K, renormalised.

    Args:
        weight: lambda.
        top_k: how many image tokens of the teacher's map are kept (paper: 8); None keeps the whole map.
        rows: whose attention is aligned: 'latents' (the paper), or 'question', 'header', 'separator', 'answer',
            'predicting'; several are allowed, and without latents gaze alignment is an arm of its own.
        layers: student layers whose rows are averaged, negative ones from the end; None is all.
        reduction: 'sum' over the rows of a sample (Eq. 7), or 'mean'.
    """

    def __init__(
        self,
        weight: float = 0.3,
        top_k: int | None = 8,
        rows: Sequence[str] = ("latents",),
        layers: Sequence[int] | None = None,
        reduction: str = "sum",
    ) -> None:
        super().__init__(weight)
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k is at least 1, or None for the whole map, got {top_k}")
        if reduction not in ("sum", "mean"):
            raise UserError(f"reduction: got '{reduction}'; allowed: mean, sum")
        self.rows = check_kinds("rows", tuple(rows))
        self.layers = tuple(layers) if layers is not None else None
        self.top_k, self.reduction, self.depth = top_k, reduction, 0

    def setup(self, width: int, depth: int, latents: int, header: Mapping[str, Any]) -> None:
        self.depth = depth
        if latents == 0 and {"latents", "separator"} & set(self.rows):
            raise UserError(
                f"the trajectory target reads the rows {', '.join(self.rows)}, and this recipe has no latents; "
                "without latents align 'header' and 'answer'"
            )
        outside = [layer for layer in self.layers or () if not -depth <= layer < depth]
        if outside:
            raise UserError(f"layers: the student has {depth} layers, got {outside}")

    def prepare(self, encoded: Encoded, trace: Trace | None) -> dict[str, Tensor]:
        assert trace is not None, "the data set hands a trace to every target that needs one"
        tiles = [span.tile for span in encoded.spans]
        try:
            gaze = resample(normalise(trace.gaze), trace.tiles, tiles)
            return {"gaze": to_distribution(gaze if self.top_k is None else top_k(gaze, self.top_k))}
        except ValueError as error:
            raise UserError(f"the trace of sample '{trace.sample_id}' cannot be a target: {error}") from None

    def forward(self, output: StudentOutput, roles: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        rows, valid = self.own_rows(output, self.depth)
        student, _ = image_rows(rows, roles)
        target = prepared["gaze"].to(student.dtype)
        if target.shape[-1] != student.shape[-1]:
            raise ValueError(f"gaze over {target.shape[-1]} image tokens, attention over {student.shape[-1]}")
        return trajectory_loss(target, student, valid, self.reduction == "mean")
