"""Trajectory alignment (LaViT, Sec. 4.2.2, Eq. 7): the latents look where the teacher looked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laavit.backbones.rows import check_kinds, image_rows
from laavit.registry import TARGETS, UserError, nearest
from laavit.structures import Encoded, StudentOutput, Tile, Trace
from laavit.targets.base import Target
from laavit.traces.gaze import normalise, to_distribution, top_k
from laavit.traces.grids import resample

STEPS = ("aggregate", "steps")
#: How a store may hold its maps (its header's settings.normalisation) -> whether Eq. 3 has scaled them already.
SCALED = {"none": False, "rows": False, "distribution": False, "minmax": True}


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


def step_of_latent(steps: int, latents: int) -> Tensor:
    """Which step of the teacher's trajectory each latent follows: long [K], floor(j * T / K).

    One to one where T = K. With fewer steps than latents each is followed by a run of neighbouring latents; with more,
    the latents follow the first of each of K runs of steps. The order of the steps is kept in any case.
    """
    return torch.arange(latents) * steps // latents


@TARGETS.register_module()
class TrajectoryTarget(Target):
    """sum_j KL(A_traj || A_student,j) against the teacher's gaze: Eq. 3, the student's tiles, Top-K, renormalised.

    Args:
        weight: lambda.
        top_k: how many image tokens of the teacher's map are kept (paper: 8); None keeps the whole map.
        rows: whose attention is aligned: 'latents' (the paper), or 'question', 'header', 'separator', 'answer',
            'predicting'; several are allowed, and without latents gaze alignment is an arm of its own.
        layers: student layers whose rows are averaged, negative ones from the end; None is all.
        reduction: 'sum' over the rows of a sample (Eq. 7), or 'mean'.
        steps: 'aggregate', one map for all rows, or 'steps', each latent j its own A_traj,j (Eq. 7 as it is written):
            the teacher's map of step floor(j * T / K). It needs traces with steps (extract.steps) and the rows
            'latents' alone. A sample whose answer left no step (an empty one) is one step, its aggregate.
    """

    def __init__(
        self,
        weight: float = 0.3,
        top_k: int | None = 8,
        rows: Sequence[str] = ("latents",),
        layers: Sequence[int] | None = None,
        reduction: str = "sum",
        steps: str = "aggregate",
    ) -> None:
        super().__init__(weight)
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k is at least 1, or None for the whole map, got {top_k}")
        if reduction not in ("sum", "mean"):
            raise UserError(f"reduction: got '{reduction}'; allowed: mean, sum")
        if steps not in STEPS:
            raise UserError(f"steps: got '{steps}'; {nearest(steps, STEPS)}")
        self.rows = check_kinds("rows", tuple(rows))
        if steps == "steps" and self.rows != ("latents",):
            raise UserError(f"steps: each latent follows its own step, so rows is 'latents', got {', '.join(rows)}")
        self.layers = tuple(layers) if layers is not None else None
        self.top_k, self.reduction, self.steps = top_k, reduction, steps
        self.depth, self.latents, self.scaled = 0, 0, False

    def setup(self, width: int, depth: int, latents: int, header: Mapping[str, Any]) -> None:
        self.depth, self.latents = depth, latents
        if latents == 0 and {"latents", "separator"} & set(self.rows):
            raise UserError(
                f"the trajectory target reads the rows {', '.join(self.rows)}, and this recipe has no latents; "
                "without latents align 'header' and 'answer'"
            )
        outside = [layer for layer in self.layers or () if not -depth <= layer < depth]
        if outside:
            raise UserError(f"layers: the student has {depth} layers, got {outside}")
        extracted = header.get("settings", {})
        normalisation = extracted.get("normalisation", "none")
        if normalisation not in SCALED:
            raise UserError(
                f"the traces were extracted with extract.normalisation '{normalisation}', which the trajectory target "
                f"does not know; allowed: {', '.join(SCALED)}"
            )
        self.scaled = SCALED[normalisation]
        if self.steps == "steps" and header and extracted.get("steps", "none") == "none":
            raise UserError(
                "steps: each latent follows a step of its own, and these traces hold none; extract with extract.steps "
                "token, word, sentence or group, or take steps: aggregate"
            )

    def prepare(self, encoded: Encoded, trace: Trace | None) -> dict[str, Tensor]:
        """A_traj on the student's image tokens, ``gaze``: [N], or [N, K] with a map for each latent."""
        assert trace is not None, "the data set hands a trace to every target that needs one"
        try:
            return {"gaze": self._maps(trace, [span.tile for span in encoded.spans])}
        except ValueError as error:
            raise UserError(f"the trace of sample '{trace.sample_id}' cannot be a target: {error}") from None

    def _maps(self, trace: Trace, tiles: Sequence[Tile]) -> Tensor:
        maps = trace.gaze
        if self.steps == "steps":
            given = [step.gaze for step in trace.steps] or [trace.gaze]
            maps = torch.stack([given[step] for step in step_of_latent(len(given), self.latents).tolist()])
        maps = resample(maps if self.scaled else normalise(maps), trace.tiles, tiles)
        maps = to_distribution(maps if self.top_k is None else top_k(maps, self.top_k))
        return maps.T if self.steps == "steps" else maps

    def forward(self, output: StudentOutput, roles: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        rows, valid = self.own_rows(output, self.depth)
        student, _ = image_rows(rows, roles)
        target = prepared["gaze"].to(student.dtype)
        if self.steps == "steps":
            target = target.transpose(1, 2)  # [B, K, N]
        if target.shape[-1] != student.shape[-1]:
            raise ValueError(f"gaze over {target.shape[-1]} image tokens, attention over {student.shape[-1]}")
        return trajectory_loss(target, student, valid, self.reduction == "mean")
