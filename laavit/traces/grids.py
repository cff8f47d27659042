"""Boxes and maps on tiles of image tokens: boxes -> patches, tiles -> tiles, a map of a whole image, mass in boxes.

A map is flat over all tiles in their order, each row by row: N = sum height * width. A tile covers an image or a part
of it (``Tile.region``), and tiles may overlap (a thumbnail of the whole image beside its crops). Wherever tiles are
asked for, an (h, w) pair stands for one whole image. Pure torch functions, differentiable in maps (and box corners).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from laavit.structures import Box, Tile

Grid = tuple[int, int]
#: what may stand for tiles: one tile or (h, w) pair, or a sequence of them
Tiles = Tile | Grid | Sequence[Grid | Tile]


def as_tiles(value: Tiles) -> tuple[Tile, ...]:
    """Tiles as they are; each (h, w) pair as a tile over a whole image, its place in the sequence naming the image.

    Raises:
        ValueError: there is none, one has no cell, or its region has no area.
    """
    if isinstance(value, Tile):
        tiles: tuple[Tile, ...] = (value,)
    elif len(value) == 2 and isinstance(value[0], int) and isinstance(value[1], int):
        tiles = (Tile(value[0], value[1]),)
    else:
        listed = cast("Sequence[Grid | Tile]", value)
        tiles = tuple(t if isinstance(t, Tile) else Tile(int(t[0]), int(t[1]), i) for i, t in enumerate(listed))
    for tile in tiles:
        x1, y1, x2, y2 = tile.region
        if tile.height < 1 or tile.width < 1 or not (x1 < x2 and y1 < y2):
            raise ValueError(f"a tile has at least 1 x 1 cells and a region with an area, got {tile}")
    if not tiles:
        raise ValueError("a map needs at least one tile")
    return tiles


def cells(tiles: Tiles) -> list[int]:
    """How many tokens each tile has."""
    return [tile.cells for tile in as_tiles(tiles)]


def boxes_to_mask(
    boxes: Sequence[Box] | Tensor, grid_h: int, grid_w: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The share of every cell's area that the union of the boxes covers, exactly: -> [grid_h * grid_w] in [0, 1].

    All box edges and grid lines cut the image into rectangles that are wholly inside or outside of each box, so
    overlapping boxes count once and nothing is sampled.

    Args:
        boxes: boxes of ONE image (``Box.image`` is not looked at), or a tensor [n, 4] of normalised x1, y1, x2, y2.
    """
    as_tiles((grid_h, grid_w))
    corners = (boxes.to(torch.float64).reshape(-1, 4) if isinstance(boxes, Tensor) else _corners(boxes)).clamp(0, 1)

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


def _corners(boxes: Sequence[Box]) -> Tensor:
    """float64 [n, 4]."""
    return torch.tensor([[b.x1, b.y1, b.x2, b.y2] for b in boxes], dtype=torch.float64).reshape(-1, 4)


def sample_mask(boxes: Sequence[Box], tiles: Tiles, dtype: torch.dtype = torch.float32) -> Tensor:
    """The share of every token's cell that lies inside the boxes of the image it looks at: -> [N] in [0, 1].

    Each box is moved into the frame of every tile of its image and clipped there; overlapping tiles are all covered.

    Raises:
        ValueError: a box names an image that has no tile.
    """
    tiles = as_tiles(tiles)
    images = {tile.image for tile in tiles}
    stray = [box.image for box in boxes if box.image not in images]
    if stray:
        raise ValueError(f"a box is on image {stray[0]}, but there are tiles of {len(images)} images")
    masks = []
    for tile in tiles:
        x1, y1, x2, y2 = tile.region
        origin, size = torch.tensor([[x1, y1] * 2, [x2 - x1, y2 - y1] * 2], dtype=torch.float64)
        corners = (_corners([box for box in boxes if box.image == tile.image]) - origin) / size
        masks.append(boxes_to_mask(corners, tile.height, tile.width, dtype))
    return torch.cat(masks)


def resample(gaze: Tensor, source: Tiles, target: Tiles, antialias: bool = True) -> Tensor:
    """A map carried from one set of tiles to another over the same images.

    Equal tiles are the identity. An image with one tile on each side, of one region, is interpolated bilinearly
    (App. C.2). Any other image is carried over by area: a cell's mass is spread evenly over what it covers, and where
    target tiles overlap they share it by their density of tokens, so that a map that is uniform over the source's
    area is uniform over the target's tokens (regular tilings), and no tile is favoured for being one of several.

    Mass: a sample of one image with one such tile on each side is plain interpolation, which keeps the scale of the
    values; renormalising is the caller's. Otherwise every image keeps exactly the mass it had. By area this is so by
    itself where the target's tiles cover the source's; what interpolation changes at the rim, or what lies outside of
    all target tiles, is made up for by scaling the image's map. An image whose mass lies wholly outside loses it.

    Args:
        gaze: [..., N_source], not negative. source, target: tiles, or (h, w) pairs of whole images.
        antialias: widen the triangle filter when going to a coarser grid. Without it a single strong patch between
            the sampling points of a coarse grid vanishes, and a Top-K map can become zero. To an equal or finer grid
            both are the same.

    Returns: [..., N_target].

    Raises:
        ValueError: the map does not fit the source, or the sides show different images.
    """
    before, after = as_tiles(source), as_tiles(target)
    _check_images(before, after)
    if gaze.shape[-1] != sum(cells(before)):
        raise ValueError(f"a map of {gaze.shape[-1]} tokens does not fit the tiles {before}")
    if before == after:
        return gaze
    parts = gaze.split(cells(before), dim=-1)
    plain = len(before) == len(after) == 1 and before[0].region == after[0].region
    found: dict[int, Tensor] = {}
    for image in dict.fromkeys(tile.image for tile in after):
        old, new = ([i for i, tile in enumerate(side) if tile.image == image] for side in (before, after))
        own, there = tuple(before[i] for i in old), tuple(after[i] for i in new)
        given = [parts[i] for i in old]
        moved = _move(given, own, there, antialias)
        if own != there and not plain:
            moved = _with_mass(moved, torch.cat(given, dim=-1).sum(-1, keepdim=True))
        found |= dict(zip(new, moved, strict=True))
    return torch.cat([found[i] for i in range(len(after))], dim=-1)


def _check_images(before: Sequence[Tile], after: Sequence[Tile]) -> None:
    there, here = ({tile.image for tile in tiles} for tiles in (before, after))
    if len(there) != len(here):
        raise ValueError(f"{len(there)} images cannot be resampled to {len(here)}")
    if there != here:
        raise ValueError(f"the images {sorted(there)} cannot be resampled to the images {sorted(here)}")


def _move(parts: Sequence[Tensor], old: tuple[Tile, ...], new: tuple[Tile, ...], antialias: bool) -> list[Tensor]:
    """One image's map on its new tiles."""
    if old == new:
        return list(parts)
    if len(old) == len(new) == 1 and old[0].region == new[0].region:
        sides = ((old[0].height, new[0].height), (old[0].width, new[0].width))
        rows, columns = (_triangle(size, new_size, antialias).to(parts[0]) for size, new_size in sides)
        grid = parts[0].reshape(*parts[0].shape[:-1], old[0].height, old[0].width)
        return [(rows @ grid @ columns.T).flatten(-2)]
    return _by_area(parts, old, new)


def _with_mass(parts: Sequence[Tensor], total: Tensor) -> list[Tensor]:
    """One image's map, scaled to a total [..., 1]; a map without mass stays as it is."""
    mass = torch.cat(list(parts), dim=-1).sum(-1, keepdim=True)
    some = mass > 0
    # The inner where keeps the division by zero out of the backward pass.
    factor = torch.where(some, total / torch.where(some, mass, torch.ones_like(mass)), torch.ones_like(mass))
    return [part * factor for part in parts]


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


def _by_area(parts: Sequence[Tensor], old: tuple[Tile, ...], new: tuple[Tile, ...]) -> list[Tensor]:
    """One image's map by area: source cells -> pieces of the image -> target cells.

    The cell lines of both sides cut the image into pieces [E_y, E_x] that lie wholly inside or outside of every cell.
    A piece's mass is divided by the token density of all target tiles that cover it; each takes its own density's
    share.
    """
    sources, targets, density = _pieces(old, new)
    mass: Tensor | None = None
    for part, tile, (rows, columns) in zip(parts, old, sources, strict=True):
        grid = part.reshape(*part.shape[:-1], tile.height, tile.width)
        spread = rows.to(part) @ grid @ columns.to(part).T
        mass = spread if mass is None else mass + spread
    assert mass is not None, "every image has a tile"
    shared = mass * density.to(mass)
    return [
        (rows.to(mass).T @ shared @ columns.to(mass)).flatten(-2) * _density(tile)
        for tile, (rows, columns) in zip(new, targets, strict=True)
    ]


def _density(tile: Tile) -> float:
    """Tokens per area of the image."""
    x1, y1, x2, y2 = tile.region
    return tile.cells / ((x2 - x1) * (y2 - y1))


Sides = list[tuple[Tensor, Tensor]]


@lru_cache(maxsize=32)
def _pieces(old: tuple[Tile, ...], new: tuple[Tile, ...]) -> tuple[Sides, Sides, Tensor]:
    """How the pieces of an image lie in the cells of both sides; float64, E pieces along an axis.

    Returns: for each source tile the share of a cell's length in each piece, ([E_y, height], [E_x, width]); for each
    target tile whether a piece lies in a cell, 0 or 1, of the same shapes; and 1 over the target's tokens per area
    [E_y, E_x], 0 where no target tile is.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        along = [[_axis(tile, vertical) for tile in (*old, *new)] for vertical in (True, False)]
        sides = [_cut(axis) for axis in along]
        shares, places = [list(zip(*(side[kind] for side in sides), strict=True)) for kind in (0, 1)]
        cover = torch.zeros(places[0][0].shape[0], places[0][1].shape[0], dtype=torch.float64)
        for tile, (rows, columns) in zip(new, places[len(old) :], strict=True):
            cover += _density(tile) * rows.sum(1)[:, None] * columns.sum(1)
        return shares[: len(old)], places[len(old) :], torch.where(cover > 0, 1 / cover, 0.0)


def _axis(tile: Tile, vertical: bool) -> Tensor:
    """A tile's cell lines along one axis of the image: float64 [cells + 1]."""
    low, high, count = tile.region[vertical], tile.region[vertical + 2], tile.height if vertical else tile.width
    return low + torch.arange(count + 1, dtype=torch.float64) / count * (high - low)


def _cut(axes: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Cell lines along one axis, of every tile -> each tile's (share of a cell in a piece, piece in a cell) [E, cells].

    Lines that differ by rounding alone leave a sliver between them, which falls to one side or the other whole.
    """
    edges = torch.cat(list(axes)).unique()
    length, middle = edges.diff(), (edges[1:] + edges[:-1]) / 2
    places = [((middle[:, None] > lines[:-1]) & (middle[:, None] < lines[1:])).double() for lines in axes]
    pieces = [place * length[:, None] for place in places]
    return [piece / piece.sum(0) for piece in pieces], places


def image_map(gaze: Tensor, tiles: Tiles, image: int = 0, size: Grid | None = None) -> Tensor:
    """One map over the whole of one image: the mass in every cell, summed over the tiles that look there.

    Args:
        gaze: [..., N]. tiles: of the whole sample. image: which image.
        size: (h, w) of the map; None takes the finest tile's cells (its own grid where one tile covers the image).

    Returns: [..., h, w]; carried over by area, so that it holds the image's whole mass.

    Raises:
        ValueError: the map does not fit the tiles, or none of them is of that image.
    """
    tiles = as_tiles(tiles)
    if gaze.shape[-1] != sum(cells(tiles)):
        raise ValueError(f"a map of {gaze.shape[-1]} tokens does not fit the tiles {tiles}")
    places = [i for i, tile in enumerate(tiles) if tile.image == image]
    if not places:
        raise ValueError(f"there is no tile of image {image}")
    own = tuple(tiles[i] for i in places)
    height, width = size or _finest(own)
    parts = gaze.split(cells(tiles), dim=-1)
    whole = (Tile(height, width, image),)
    given = [parts[i] for i in places]
    found = given if own == whole else _by_area(given, own, whole)
    return found[0].reshape(*gaze.shape[:-1], height, width)


def _finest(tiles: Sequence[Tile]) -> Grid:
    """Cells of a whole image, (h, w), as small as the smallest of its tiles' cells."""
    heights = [tile.height / (tile.region[3] - tile.region[1]) for tile in tiles]
    widths = [tile.width / (tile.region[2] - tile.region[0]) for tile in tiles]
    return round(max(heights)), round(max(widths))


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
