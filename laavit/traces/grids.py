"""Boxes and maps on grids of image tokens: boxes -> patches, grid -> grid, mass inside boxes.

A map of one image is flat, [h * w] row by row; a sample's map is its images' maps one after the other, N = sum h * w.
Pure torch functions, differentiable in maps (and in box corners).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from laavit.structures import Box, Tile

Grid = tuple[int, int]


def cells(grids: Sequence[Grid | Tile]) -> list[int]:
    """How many tokens each image has."""
    grids = _as_grids(grids)
    if not grids or any(height < 1 or width < 1 for height, width in grids):
        raise ValueError(f"grids are (height, width) pairs of at least 1 x 1, got {list(grids)}")
    return [height * width for height, width in grids]


def boxes_to_mask(
    boxes: Sequence[Box] | Tensor, grid_h: int, grid_w: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The share of every cell's area that the union of the boxes covers, exactly: -> [grid_h * grid_w] in [0, 1].

    All box edges and grid lines cut the image into rectangles that are wholly inside or outside of each box, so
    overlapping boxes count once and nothing is sampled.

    Args:
        boxes: boxes of ONE image (``Box.image`` is not looked at), or a tensor [n, 4] of normalised x1, y1, x2, y2.
    """
    cells([(grid_h, grid_w)])
    if isinstance(boxes, Tensor):
        corners = boxes.to(torch.float64).reshape(-1, 4)
    else:
        corners = torch.tensor([[b.x1, b.y1, b.x2, b.y2] for b in boxes], dtype=torch.float64).reshape(-1, 4)
    corners = corners.clamp(0, 1)

    def cut(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Edges along one axis -> lengths [E], cell of each piece [E, count], whether box n covers it [n, E]."""
        lines = torch.arange(count + 1, dtype=torch.float64, device=corners.device) / count
        edges = torch.cat([lines, low, high]).sort().values
        middle = ((edges[1:] + edges[:-1]) / 2).detach()
        cell = (middle * count).long().clamp(max=count - 1)
        inside = (low.detach()[:, None] < middle) & (middle < high.detach()[:, None])
        return edges.diff(), F.one_hot(cell, count).to(torch.float64), inside

    widths, column, inside_x = cut(corners[:, 0], corners[:, 2], grid_w)
    heights, row, inside_y = cut(corners[:, 1], corners[:, 3], grid_h)
    covered = (inside_y.to(torch.float64).T @ inside_x.to(torch.float64)) > 0  # [Ey, Ex]: inside at least one box
    area = covered * heights[:, None] * widths
    share = row.T @ area @ column * (grid_h * grid_w)
    return share.clamp(0, 1).flatten().to(dtype)


def sample_mask(boxes: Sequence[Box], grids: Sequence[Grid | Tile], dtype: torch.dtype = torch.float32) -> Tensor:
    """``boxes_to_mask`` over all images of a sample, each box on the image it names: -> [N].

    Raises:
        ValueError: a box names an image that has no grid.
    """
    cells(grids)
    stray = [box.image for box in boxes if not 0 <= box.image < len(grids)]
    if stray:
        raise ValueError(f"a box is on image {stray[0]}, but there are {len(grids)} grids")
    masks = [
        boxes_to_mask([box for box in boxes if box.image == image], height, width, dtype)
        for image, (height, width) in enumerate(_as_grids(grids))
    ]
    return torch.cat(masks)


def resample(
    gaze: Tensor, source: Grid | Sequence[Grid | Tile], target: Grid | Sequence[Grid | Tile], antialias: bool = True
) -> Tensor:
    """Bilinear interpolation of a map from one grid to another (App. C.2); renormalising is the caller's.

    Equal grids are the identity. With several images each is interpolated on its own and weighted by its cells before
    over its cells after, so that the images keep their shares of the mass (one image is plain interpolation).

    Args:
        gaze: [..., N_source]. source, target: (h, w) of one image, or one such pair an image.
        antialias: widen the triangle filter when going to a coarser grid. Without it a single strong patch between
            the sampling points of a coarse grid vanishes, and a Top-K map can become zero. To an equal or finer grid
            both are the same.

    Returns: [..., N_target].
    """
    before, after = _as_grids(source), _as_grids(target)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} images cannot be resampled to {len(after)}")
    if gaze.shape[-1] != sum(cells(before)):
        raise ValueError(f"a map of {gaze.shape[-1]} tokens does not fit the grids {before}")
    cells(after)
    if before == after:
        return gaze
    parts = []
    for part, old, new in zip(gaze.split(cells(before), dim=-1), before, after, strict=True):
        rows, columns = (_triangle(size, new_size, antialias).to(gaze) for size, new_size in zip(old, new, strict=True))
        image = rows @ part.reshape(*gaze.shape[:-1], *old) @ columns.T
        weight = 1.0 if len(before) == 1 else old[0] * old[1] / (new[0] * new[1])
        parts.append(image.flatten(-2) * weight)
    return torch.cat(parts, dim=-1)


@lru_cache(maxsize=256)
def _triangle(size: int, new_size: int, antialias: bool) -> Tensor:
    """The weights of linear interpolation along one axis, float64 [new_size, size], rows summing to 1.

    ``interpolate(mode="bilinear", align_corners=False)`` as a matrix: torch 2.14.1's antialiased CPU kernel is wrong
    for maps one cell wide, and its CUDA backward is not deterministic.
    """
    scale = size / new_size
    reach = max(scale, 1.0) if antialias else 1.0
    # Kept for later calls, so it must not be an inference tensor nor stand on a device that is default just now.
    with torch.inference_mode(False), torch.no_grad():
        centres = (torch.arange(new_size, dtype=torch.float64, device="cpu") + 0.5) * scale
        cell = torch.arange(size, dtype=torch.float64, device="cpu") + 0.5
        weights = (1 - (cell - centres[:, None]).abs() / reach).clamp(min=0)
        return weights / weights.sum(1, keepdim=True)


def in_box_mass(gaze: Tensor, mask: Tensor) -> Tensor:
    """The share of the map's mass inside the boxes, S_focus of Sec. 3.1: [..., N], [..., N] -> [...] in [0, 1].

    Raises:
        ValueError: shapes differ, or a map has no mass.
    """
    if gaze.shape[-1] != mask.shape[-1]:
        raise ValueError(f"a map of {gaze.shape[-1]} tokens and a mask of {mask.shape[-1]} do not fit")
    total = gaze.sum(-1)
    if not bool((total.detach() > 0).all()):
        raise ValueError("the mass inside boxes needs a map with mass")
    return ((gaze * mask.to(gaze.dtype)).sum(-1) / total).clamp(0, 1)


def _as_grids(value: Grid | Sequence[Grid | Tile]) -> list[Grid]:
    """One (h, w) pair or a sequence of them -> a list of pairs."""
    if len(value) == 2 and all(isinstance(side, int) for side in value):
        return [(int(value[0]), int(value[1]))]  # type: ignore[call-overload, arg-type]
    pairs = [(grid.height, grid.width) if isinstance(grid, Tile) else grid for grid in value]
    return [(int(height), int(width)) for height, width in pairs]  # type: ignore[misc]
