"""Region embeddings (LVR, arXiv 2509.24251): latents rebuild the student's own projected patches inside the boxes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laavit.backbones.rows import positions
from laavit.registry import TARGETS, UserError, nearest
from laavit.structures import Encoded, Role, StudentOutput, Trace
from laavit.targets.base import Target
from laavit.targets.concept import latent_states
from laavit.targets.controls import STATE_CONTROLS, check_control, shuffled_cells
from laavit.targets.losses import STATE_LOSSES, over_rows
from laavit.traces.grids import sample_mask

MATCHES = ("order", "mean")


@TARGETS.register_module()
class RegionTarget(Target):
    """MSE of the latents' states h_j (after the decoder's last norm) to patches in the box, as the decoder reads them.

    LVR rebuilds every patch in the box with as many latents; K latents rebuild K of them. No teacher takes part, and
    nothing is learned through the patches: they are targets alone (LVR freezes tower and projector).

    Args:
        weight: its share in the total loss.
        match: 'order', latent j to patch floor(j * M / K) of the M that boxes cover by half or more (of those that
            they touch, where there is none), row by row; or 'mean', every latent to the mean by covered area.
        loss: 'mse' (LVR), 'cosine' or 'smooth_l1'.
        control: 'shuffled' (another sample's boxes), 'wrong_image' (those of another image), 'random' (patches at as
            many random places), or 'none'. seed: fixes the control's choices.
    """

    needs_latents = True
    needs_trace = False
    needs_boxes = True
    needs_embeddings = True

    def __init__(
        self, weight: float = 0.1, match: str = "order", loss: str = "mse", control: str = "none", seed: int = 0
    ) -> None:
        super().__init__(weight)
        if match not in MATCHES:
            raise UserError(f"match: got '{match}'; {nearest(match, MATCHES)}")
        if loss not in STATE_LOSSES:
            raise UserError(f"loss: got '{loss}'; {nearest(loss, STATE_LOSSES)}")
        self.match, self.loss = match, loss
        self.control, self.seed = check_control(control, STATE_CONTROLS), seed

    def setup(self, width: int, depth: int, latents: int, header: Mapping[str, Any]) -> None:
        if latents == 0:
            raise UserError("the region target reads the latents' states, and this recipe has no latents")

    def prepare(self, encoded: Encoded, trace: Trace | None) -> dict[str, Tensor]:
        """``share``: what each image token takes part in each latent's target, [N, K], columns of sum 1."""
        sample, count = encoded.sample, int((encoded.roles == Role.LATENT).sum())
        if not sample.boxes:
            raise UserError(f"sample '{sample.id}' has no box, and the region target needs one")
        try:
            covered = sample_mask(sample.boxes, [span.tile for span in encoded.spans], torch.float64)
        except ValueError as error:
            raise UserError(f"the boxes of sample '{sample.id}' cannot be a target: {error}") from None
        if self.control == "random":
            covered = shuffled_cells(covered, self.seed, sample.id)
        if self.match == "mean":
            return {"share": (covered / covered.sum())[:, None].expand(-1, count)}
        inside = (covered >= 0.5).nonzero().flatten()
        inside = inside if len(inside) else (covered > 0).nonzero().flatten()
        share = torch.zeros(len(covered), count)
        share[inside[torch.arange(count) * len(inside) // count], torch.arange(count)] = 1.0
        return {"share": share}

    def forward(self, output: StudentOutput, roles: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        assert output.embeddings is not None, "the model keeps embeddings for every target that needs them"
        states, valid = latent_states(output, roles)
        kind = torch.promote_types(states.dtype, torch.float32)
        index = positions(roles == Role.IMAGE).clamp(min=0)  # padding has no share
        patches = output.embeddings.detach().gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
        wanted = prepared["share"].to(kind).transpose(1, 2) @ patches.to(kind)  # [B, K, D]
        return over_rows(STATE_LOSSES[self.loss](states.to(kind), wanted), valid, per_row_mean=True)
