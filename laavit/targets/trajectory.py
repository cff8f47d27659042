"""Trajectory alignment (LaViT, Sec. 4.2.2, Eq. 7): the student looks where the teacher looked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laavit.backbones.rows import emits
from laavit.registry import TARGETS, UserError, nearest
from laavit.structures import Encoded, Role, StudentOutput, Tile, Trace
from laavit.targets.losses import DIVERGENCES, over_rows
from laavit.targets.maps import MapTarget
from laavit.targets.steps import step_of_latent
from laavit.traces.gaze import normalise, to_distribution, top_k
from laavit.traces.grids import resample

STEPS = ("aggregate", "steps", "layers", "answer")
#: What follows a step of any kind.
FOLLOWER = {"steps": "latent", "layers": "layer"}
#: How a store may hold its maps (its header's settings.normalisation) -> whether Eq. 3 has scaled them already.
SCALED = {"none": False, "rows": False, "distribution": False, "minmax": True}


def trajectory_loss(
    target: Tensor, student: Tensor, valid: Tensor, per_row_mean: bool = False, divergence: str = "kl"
) -> Tensor:
    """L_traj = mean over the batch of sum_j KL(A_traj || A_student,j) (Eq. 7).

    Args:
        target: A_traj, non-negative, sums to 1 over N: [B, N] (one map for all rows) or [B, R, N].
        student: attention of each row to the image tokens, not yet renormalised: [B, R, N].
        valid: bool [B, R], rows that are no padding.
        per_row_mean: divide each sample's sum by its number of rows (for kinds of rows whose number varies).
        divergence: another one in the place of KL, a name of ``DIVERGENCES``.

    Both sides are distributions over the image tokens: ``student`` is renormalised here. 0 log 0 is 0.
    """
    target = target if target.ndim == 3 else target[:, None]
    return over_rows(DIVERGENCES[divergence](target, student), valid, per_row_mean)


@TARGETS.register_module()
class TrajectoryTarget(MapTarget):
    """sum_j KL(A_traj || A_student,j) against the teacher's gaze: Eq. 3, the student's tiles, Top-K, renormalised.

    A teacher layer matched to a student layer is a target of its own: one store for each teacher layer
    (extract.layers), and one of these targets with ``store`` and ``layers`` for each pair.

    Args:
        weight: lambda.
        top_k: how many image tokens of the teacher's map are kept (paper: 8); None keeps the whole map.
        rows: whose attention is aligned: 'latents' (the paper), or 'question', 'header', 'separator', 'answer',
            'predicting'; several are allowed, and without latents gaze alignment is an arm of its own.
        layers: student layers whose rows are averaged, negative ones from the end; None is all.
        reduction: 'sum' over the rows of a sample (Eq. 7), or 'mean'.
        steps: 'aggregate', one map for all rows; or maps of the teacher's steps (extract.steps), where a sample whose
            answer left no step (an empty one) is one step, its aggregate: 'steps', each latent j its own A_traj,j
            (Eq. 7 as it is written), the teacher's map of step floor(j * T / K), for the rows 'latents' alone;
            'layers', all rows of the j-th of L layers (as ``layers`` names them) step floor(j * T / L), averaged over
            these layers; 'answer', the row that predicts each of the answer's tokens that token's own map, for the
            rows 'predicting' alone and traces of the gold answer with extract.steps 'token' (by another tokenizer
            token i of M follows step floor(i * T / M)).
        divergence: 'kl' (target || student, Eq. 7), 'reverse_kl' (student || target), 'js', or 'mse'.
        smoothing: share of the target that is spread evenly over the image tokens.
        store: a trace store of its own, in place of traces.path.
        control: 'shuffled' (another sample's gaze), 'wrong_image' (of another image), 'random' (the same values at
            random places), 'uniform', or 'none'. seed: fixes the control's choices.
    """

    def __init__(
        self,
        weight: float = 0.3,
        top_k: int | None = 8,
        rows: Sequence[str] = ("latents",),
        layers: Sequence[int] | None = None,
        reduction: str = "sum",
        steps: str = "aggregate",
        divergence: str = "kl",
        smoothing: float = 0.0,
        store: str | None = None,
        control: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__(weight, rows, layers, reduction, divergence, smoothing, control, seed)
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k is at least 1, or None for the whole map, got {top_k}")
        if steps not in STEPS:
            raise UserError(f"steps: got '{steps}'; {nearest(steps, STEPS)}")
        if steps == "steps" and self.rows != ("latents",):
            raise UserError(f"steps: each latent follows its own step, so rows is 'latents', got {', '.join(rows)}")
        if steps == "answer" and self.rows != ("predicting",):
            raise UserError(
                f"steps: each token of the answer follows its own map, so rows is 'predicting', got {', '.join(rows)}"
            )
        if control == "uniform" and steps != "aggregate":
            raise UserError(f"control: a uniform map has no steps, so steps is 'aggregate', got '{steps}'")
        self.top_k, self.steps, self.store, self.scaled = top_k, steps, store, False
        self.needs_trace = control != "uniform"

    def setup(self, width: int, depth: int, latents: int, header: Mapping[str, Any]) -> None:
        super().setup(width, depth, latents, header)
        extracted = header.get("settings", {})
        normalisation = extracted.get("normalisation", "none")
        if normalisation not in SCALED:
            raise UserError(
                f"the traces were extracted with extract.normalisation '{normalisation}', which the trajectory target "
                f"does not know; allowed: {', '.join(SCALED)}"
            )
        self.scaled = SCALED[normalisation]
        if self.steps in FOLLOWER and header and extracted.get("steps", "none") == "none":
            raise UserError(
                f"steps: each {FOLLOWER[self.steps]} follows a step of its own, and these traces hold none; "
                "extract with extract.steps token, word, sentence or group, or take steps: aggregate"
            )
        needed = {"steps": "token", "answer": "gold", "step_rows": "predicting"}
        wrong = [f"extract.{key} {extracted.get(key)}" for key, value in needed.items() if extracted.get(key) != value]
        if self.steps == "answer" and header and wrong:
            raise UserError(
                "steps: 'answer' compares the gold answer's tokens one by one, which needs traces with "
                f"{', '.join(f'extract.{key} {value}' for key, value in needed.items())}; these have {', '.join(wrong)}"
            )

    def maps(self, encoded: Encoded, trace: Trace | None, tiles: Sequence[Tile]) -> Tensor:
        """A_traj on the student's tiles: [N], or [M, N]: a map for each latent, layer or predicting row."""
        assert trace is not None, "the data set hands a trace to every target that needs one"
        found = trace.gaze
        if self.steps != "aggregate":
            found = self._steps(encoded, trace)
        try:
            found = resample(found if self.scaled else normalise(found), trace.tiles, tiles)
            found = to_distribution(found if self.top_k is None else top_k(found, self.top_k))
        except ValueError as error:
            raise UserError(f"the trace of sample '{trace.sample_id}' cannot be a target: {error}") from None
        if self.steps == "answer":  # the row that predicts the end of the turn follows nothing
            found = torch.cat([found, found.new_zeros(1, found.shape[-1])])
        return found

    def _steps(self, encoded: Encoded, trace: Trace) -> Tensor:
        """The teacher's maps in the order of what follows them: [M, N_t]."""
        given = [step.gaze for step in trace.steps] or [trace.gaze]
        if self.steps == "answer":
            count = int(((encoded.labels >= 0) & ~emits(encoded.roles)).sum()) - 1
        elif self.steps == "steps":
            count = int((encoded.roles == Role.LATENT).sum())
        else:
            count = len(self.own_layers(self.depth))
        return torch.stack([given[step] for step in step_of_latent(len(given), count).tolist()])

    def forward(self, output: StudentOutput, roles: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        if self.steps == "aggregate":
            return super().forward(output, roles, prepared)
        maps = prepared["gaze"].transpose(1, 2)  # [B, M, N]
        if self.steps != "layers":
            return self.compare(output, roles, maps)
        return self.compare_layers(output, roles, maps.split(1, 1))
