"""Ground truth in the teacher's place: attention is led to the annotated boxes. No trace is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from laavit.registry import TARGETS, UserError, nearest
from laavit.structures import Box, Encoded, Role, StudentOutput, Tile, Trace
from laavit.targets.maps import MapTarget
from laavit.targets.steps import ORDERS, hop_boxes, ordered, step_of_latent
from laavit.traces.gaze import to_distribution
from laavit.traces.grids import sample_mask

STEPS = ("aggregate", "steps", "layers", "steps_by_layer", "final")


@TARGETS.register_module()
class BoxTarget(MapTarget):
    """sum_j KL(A_box || A_student,j), A_box the share of each token's cell inside the boxes, scaled to sum 1.

    What the trajectory target gains over it is what a teacher's gaze is worth beside the annotation.

    Args:
        weight: lambda.
        rows: whose attention is aligned: 'latents', or 'question', 'header', 'separator', 'answer', 'predicting'.
        layers: student layers whose rows are averaged, negative ones from the end; None is all.
        reduction: 'sum' over the rows of a sample (Eq. 7), or 'mean'.
        steps: 'aggregate', one map of all boxes for all rows; or maps of T hops, in the order in which the sample's
            boxes are looked at (``laavit.targets.steps.hop_boxes``): 'steps', latent j of K hop floor(j * T / K), for
            the rows 'latents' alone; 'layers', all rows of the j-th of L layers (as ``layers`` names them) hop
            floor(j * T / L), averaged over these layers; 'steps_by_layer', latent j its hop, and only in the layers of
            that hop; 'final', all rows the last hop.
        order: of the hops: 'given', or as negative controls 'reversed' or 'shuffled' (never as given).
        divergence: 'kl' (target || student, Eq. 7), 'reverse_kl' (student || target), 'js', or 'mse'.
        smoothing: share of the target that is spread evenly over the image tokens.
        control: 'shuffled' (another sample's boxes), 'wrong_image' (of another image), 'random' (as many tokens at
            random places), 'uniform', or 'none'. seed: fixes the control's choices and the order.
    """

    needs_trace = False
    needs_boxes = True

    def __init__(
        self,
        weight: float = 0.3,
        rows: Sequence[str] = ("latents",),
        layers: Sequence[int] | None = None,
        reduction: str = "sum",
        steps: str = "aggregate",
        order: str = "given",
        divergence: str = "kl",
        smoothing: float = 0.0,
        control: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__(weight, rows, layers, reduction, divergence, smoothing, control, seed)
        for name, value, allowed in (("steps", steps, STEPS), ("order", order, ORDERS)):
            if value not in allowed:
                raise UserError(f"{name}: got '{value}'; {nearest(value, allowed)}")
        if steps.startswith("steps") and self.rows != ("latents",):
            raise UserError(f"steps: each latent follows its own hop, so rows is 'latents', got {', '.join(rows)}")
        if steps in ("aggregate", "final") and order != "given":
            raise UserError(f"order: with steps '{steps}' all rows follow one map, and hops have no order")
        if control == "uniform" and steps != "aggregate":
            raise UserError(f"control: a uniform map has no hops, so steps is 'aggregate', got '{steps}'")
        self.steps, self.order = steps, order
        self.needs_boxes = control != "uniform"
        self.needs_hops = steps != "aggregate"

    def maps(self, encoded: Encoded, trace: Trace | None, tiles: Sequence[Tile]) -> Tensor:
        """A_box on the student's tiles: float64 [N], or [M, N]: a map for each latent, or for each layer."""
        sample = encoded.sample
        if not sample.boxes:
            raise UserError(f"sample '{sample.id}' has no box, and the box target needs one")

        def share(boxes: Sequence[Box]) -> Tensor:
            try:
                return to_distribution(sample_mask(boxes, tiles, torch.float64))
            except ValueError as error:
                raise UserError(f"the boxes of sample '{sample.id}' cannot be a target: {error}") from None

        if self.steps == "aggregate":
            return share(sample.boxes)
        hops = hop_boxes(sample)
        if self.steps == "final":
            return share(hops[-1])
        each = torch.stack([share(hop) for hop in ordered(hops, self.order, self.seed, sample.id)])
        return each[self._own_hops(encoded, len(hops), "layers" if self.steps == "layers" else "latents")]

    def _own_hops(self, encoded: Encoded, hops: int, followers: str) -> Tensor:
        """The hop, by its place in the order, that each layer or latent follows: long [L] or [K]."""
        latents = int((encoded.roles == Role.LATENT).sum())
        return step_of_latent(hops, len(self.own_layers(self.depth)) if followers == "layers" else latents)

    def prepare(self, encoded: Encoded, trace: Trace | None) -> dict[str, Tensor]:
        """``gaze``: [N], or [N, M] with several maps; ``own``, of 'steps_by_layer': bool [L, K], who follows where."""
        prepared = super().prepare(encoded, trace)
        if self.steps == "steps_by_layer":
            hops = len(hop_boxes(encoded.sample))
            by_layer, by_latent = (self._own_hops(encoded, hops, who) for who in ("layers", "latents"))
            prepared["own"] = by_layer[:, None] == by_latent
        return prepared

    def forward(self, output: StudentOutput, roles: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        if self.steps == "layers":
            return self.compare_layers(output, roles, prepared["gaze"].transpose(1, 2).split(1, 1))
        if self.steps == "steps_by_layer":
            maps = prepared["gaze"].transpose(1, 2)  # [B, K, N]
            return self.compare_layers(output, roles, [maps * own[..., None] for own in prepared["own"].unbind(1)])
        return super().forward(output, roles, prepared)
