"""Ground truth in the teacher's place: attention is led to the annotated boxes. No trace is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laavit.registry import TARGETS, UserError
from laavit.structures import Encoded, Tile, Trace
from laavit.targets.maps import MapTarget
from laavit.traces.gaze import to_distribution
from laavit.traces.grids import sample_mask


@TARGETS.register_module()
class BoxTarget(MapTarget):
    """sum_j KL(A_box || A_student,j), A_box the share of each token's cell inside the boxes, scaled to sum 1.

    What the trajectory target gains over it is what a teacher's gaze is worth beside the annotation.

    Args:
        weight: lambda.
        rows: whose attention is aligned: 'latents', or 'question', 'header', 'separator', 'answer', 'predicting'.
        layers: student layers whose rows are averaged, negative ones from the end; None is all.
        reduction: 'sum' over the rows of a sample (Eq. 7), or 'mean'.
        divergence: 'kl' (target || student, Eq. 7), 'reverse_kl' (student || target), 'js', or 'mse'.
        smoothing: share of the target that is spread evenly over the image tokens.
        control: 'shuffled' (another sample's boxes), 'wrong_image' (of another image), 'random' (as many tokens at
            random places), 'uniform', or 'none'. seed: fixes the control's choices.
    """

    needs_trace = False
    needs_boxes = True

    def __init__(
        self,
        weight: float = 0.3,
        rows: Sequence[str] = ("latents",),
        layers: Sequence[int] | None = None,
        reduction: str = "sum",
        divergence: str = "kl",
        smoothing: float = 0.0,
        control: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__(weight, rows, layers, reduction, divergence, smoothing, control, seed)
        self.needs_boxes = control != "uniform"

    def maps(self, encoded: Encoded, trace: Trace | None, tiles: Sequence[Tile]) -> Tensor:
        """A_box on the student's tiles: float64 [N]."""
        sample = encoded.sample
        if not sample.boxes:
            raise UserError(f"sample '{sample.id}' has no box, and the box target needs one")
        try:
            return to_distribution(sample_mask(sample.boxes, tiles, torch.float64))
        except ValueError as error:
            raise UserError(f"the boxes of sample '{sample.id}' cannot be a target: {error}") from None
