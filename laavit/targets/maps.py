"""What all gaze targets share: rows of choice, divergences, controls. Where a map comes from is a subclass's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laavit.backbones.rows import check_kinds, image_rows
from laavit.registry import UserError, nearest
from laavit.structures import Encoded, StudentOutput, Tile, Trace
from laavit.targets.base import Target
from laavit.targets.controls import check_control, shuffled_cells
from laavit.targets.losses import DIVERGENCES, over_rows


class MapTarget(Target):
    """The attention of chosen rows to the image tokens is led to a map, a distribution over them.

    Args:
        weight: lambda.
        rows: whose attention is aligned, kinds of ``laavit.backbones.rows``.
        layers: student layers whose rows are averaged, negative ones from the end; None is all.
        reduction: 'sum' over the rows of a sample (Eq. 7), or 'mean'.
        divergence: 'kl' (target || student, Eq. 7), 'reverse_kl' (student || target), 'js', or 'mse'.
        smoothing: share of the target that is spread evenly over the image tokens.
        control: 'none', or a negative control (``laavit.targets.controls``). seed: fixes the control's choices.
    """

    def __init__(
        self,
        weight: float,
        rows: Sequence[str],
        layers: Sequence[int] | None,
        reduction: str,
        divergence: str,
        smoothing: float,
        control: str,
        seed: int,
    ) -> None:
        super().__init__(weight)
        self.rows = check_kinds("rows", tuple(rows))
        self.needs_latents = not {"latents", "separator"}.isdisjoint(self.rows)
        self.layers = tuple(layers) if layers is not None else None
        if self.layers == ():
            raise UserError("layers: names no layer; leave it out for all")
        if reduction not in ("sum", "mean"):
            raise UserError(f"reduction: got '{reduction}'; allowed: mean, sum")
        if divergence not in DIVERGENCES:
            raise UserError(f"divergence: got '{divergence}'; {nearest(divergence, DIVERGENCES)}")
        if not 0 <= smoothing < 1:
            raise UserError(f"smoothing: in [0, 1), got {smoothing}")
        if divergence == "reverse_kl" and smoothing == 0:
            raise UserError(
                "divergence: 'reverse_kl' is infinite where the student looks and the target is zero, as it is outside "
                "of the Top-K, of boxes, and at a scaled map's least cell; give smoothing (for example 0.01)"
            )
        self.reduction, self.divergence, self.smoothing = reduction, divergence, smoothing
        self.control, self.seed = check_control(control), seed
        self.depth = 0

    def setup(self, width: int, depth: int, latents: int, header: Mapping[str, Any]) -> None:
        self.depth = depth
        if latents == 0 and self.needs_latents:
            name = type(self).__name__.removesuffix("Target").lower()
            raise UserError(
                f"the {name} target reads the rows {', '.join(self.rows)}, and this recipe has no latents; "
                "without latents align 'header' and 'answer'"
            )
        outside = [layer for layer in self.layers or () if not -depth <= layer < depth]
        if outside:
            raise UserError(f"layers: the student has {depth} layers, got {outside}")

    def maps(self, encoded: Encoded, trace: Trace | None, tiles: Sequence[Tile]) -> Tensor:
        """The target on the student's tiles, distributions: [N], or [M, N] with several maps.

        Raises:
            UserError: a sentence that names the sample.
        """
        raise TypeError(f"{type(self).__name__} must define maps(encoded, trace, tiles)")

    def prepare(self, encoded: Encoded, trace: Trace | None) -> dict[str, Tensor]:
        """The target on the student's image tokens, ``gaze``: [N], or [N, M] with several maps."""
        tiles = [span.tile for span in encoded.spans]
        tokens = sum(tile.cells for tile in tiles)
        if self.control == "uniform":
            maps = torch.full((tokens,), 1 / tokens, dtype=torch.float64)
        else:
            maps = self.maps(encoded, trace, tiles)
        if self.control == "random":
            maps = shuffled_cells(maps, self.seed, encoded.sample.id)
        if self.smoothing:  # a map that stands for no row stays zero
            followed = (maps.sum(-1, keepdim=True) > 0).to(maps)
            maps = (1 - self.smoothing) * maps + self.smoothing / tokens * followed
        return {"gaze": maps.T if maps.ndim == 2 else maps}

    def forward(self, output: StudentOutput, roles: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        target = prepared["gaze"]
        return self.compare(output, roles, target.transpose(1, 2) if target.ndim == 3 else target[:, None])

    def compare(
        self, output: StudentOutput, roles: Tensor, target: Tensor, layers: Sequence[int] | None = None
    ) -> Tensor:
        """The divergence of the rows' attention, averaged over layers, from maps [B, 1 or R, N]: a scalar.

        Args:
            layers: in place of the target's own.
        """
        rows, valid = self.own_rows(output, layers if layers is not None else self.own_layers(self.depth))
        student, _ = image_rows(rows, roles)
        target = target.to(student.dtype)
        if target.shape[-1] != student.shape[-1]:
            raise ValueError(f"gaze over {target.shape[-1]} image tokens, attention over {student.shape[-1]}")
        divergence = DIVERGENCES[self.divergence](target, student)
        followed = target.sum(-1) > 0  # a row without a map of its own follows nothing
        return over_rows(divergence, valid & followed, self.reduction == "mean")

    def compare_layers(self, output: StudentOutput, roles: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """The mean over the target's layers of ``compare`` with maps of their own, [B, 1 or R, N] each: a scalar."""
        each = zip(self.own_layers(self.depth), targets, strict=True)
        return torch.stack([self.compare(output, roles, target, [layer]) for layer, target in each]).mean()
