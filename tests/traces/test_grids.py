"""Boxes to patches, grid to grid, mass in boxes: closed forms and properties."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from laavit.structures import Box, Tile
from laavit.traces.grids import as_tiles, boxes_to_mask, image_map, in_box_mass, resample, sample_mask

sides = st.integers(1, 9)
fast = settings(max_examples=60, deadline=None)


@st.composite
def a_box(draw, image=0):
    x1, y1 = draw(st.floats(0, 0.99)), draw(st.floats(0, 0.99))
    return Box(x1, y1, draw(st.floats(x1 + 0.005, 1)), draw(st.floats(y1 + 0.005, 1)), image)


boxes = st.lists(a_box(), min_size=1, max_size=4)


@st.composite
def a_map(draw, height, width):
    values = draw(st.lists(st.floats(0, 1), min_size=height * width, max_size=height * width))
    values[draw(st.integers(0, len(values) - 1))] += 0.5  # no map without mass
    return torch.tensor(values, dtype=torch.float64)


def overlap(low, high, cell, count):
    return max(0.0, min(high, (cell + 1) / count) - max(low, cell / count)) * count


@given(a_box(), sides, sides)
@fast
def test_one_box_covers_the_product_of_its_overlaps(box, h, w):
    expected = [overlap(box.y1, box.y2, i, h) * overlap(box.x1, box.x2, j, w) for i in range(h) for j in range(w)]
    assert boxes_to_mask([box], h, w, torch.float64).tolist() == pytest.approx(expected, abs=1e-12)


@given(boxes, sides, sides)
@fast
def test_union_of_boxes(several, h, w):
    mask = boxes_to_mask(several, h, w, torch.float64)
    assert ((mask >= 0) & (mask <= 1)).all()
    singles = torch.stack([boxes_to_mask([box], h, w, torch.float64) for box in several])
    assert (mask >= singles.amax(0) - 1e-12).all() and (mask <= singles.sum(0) + 1e-12).all()
    assert torch.allclose(mask, boxes_to_mask(several[::-1] + several, h, w, torch.float64), atol=1e-12)
    # The covered area does not depend on the grid it is measured on.
    assert mask.mean().item() == pytest.approx(boxes_to_mask(several, 1, 1, torch.float64).item(), abs=1e-12)


@given(boxes)
@fast
def test_union_area_by_inclusion_and_exclusion(several):
    def area(first, *rest):
        x1, y1 = max(b.x1 for b in (first, *rest)), max(b.y1 for b in (first, *rest))
        x2, y2 = min(b.x2 for b in (first, *rest)), min(b.y2 for b in (first, *rest))
        return max(0, x2 - x1) * max(0, y2 - y1)

    total, n = 0.0, len(several)
    for subset in range(1, 2**n):
        chosen = [several[i] for i in range(n) if subset >> i & 1]
        total += area(*chosen) * (-1) ** (len(chosen) + 1)
    assert boxes_to_mask(several, 5, 3, torch.float64).mean().item() == pytest.approx(total, abs=1e-9)


def test_exact_cases():
    assert boxes_to_mask([Box(0, 0, 1, 1)], 4, 6).tolist() == [1.0] * 24
    assert boxes_to_mask([Box(0.25, 0, 0.75, 1)], 1, 2).tolist() == [0.5, 0.5]
    assert boxes_to_mask([Box(1 / 3, 1 / 3, 2 / 3, 2 / 3)], 3, 3).tolist() == pytest.approx([0] * 4 + [1] + [0] * 4)
    assert boxes_to_mask([], 2, 2).tolist() == [0.0] * 4
    halves = [Box(0, 0, 0.6, 1), Box(0.4, 0, 1, 1)]
    assert boxes_to_mask(halves, 3, 3).tolist() == pytest.approx([1.0] * 9)


def test_box_corners_have_gradients():
    corners = torch.tensor([[0.1, 0.2, 0.55, 0.7]], dtype=torch.float64, requires_grad=True)
    weight = torch.arange(12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c: (boxes_to_mask(c, 3, 4, torch.float64) * weight).sum(), (corners,))


def test_boxes_fall_on_their_own_image():
    mask = sample_mask([Box(0, 0, 1, 1, 1), Box(0, 0, 0.5, 1, 2)], [(2, 2), (1, 3), (1, 2)])
    assert mask.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="image 3"):
        sample_mask([Box(0, 0, 1, 1, 3)], [(2, 2)])


@given(st.data(), sides, sides)
@fast
def test_equal_grids_are_the_identity(data, h, w):
    gaze = data.draw(a_map(h, w))
    assert torch.equal(resample(gaze, (h, w), (h, w)), gaze)
    assert torch.equal(resample(gaze, [(h, w)], [(h, w)]), gaze)


@given(st.data(), sides, sides, sides, sides)
@fast
def test_resampling_keeps_bounds_and_mass_where_bilinear_can(data, h, w, h2, w2):
    gaze = data.draw(a_map(h, w))
    moved = resample(gaze, (h, w), (h2, w2))
    assert moved.shape == (h2 * w2,)
    assert moved.min() >= gaze.min() - 1e-9 and moved.max() <= gaze.max() + 1e-9
    assert moved.sum() > 0  # a peak is never lost
    share = moved / moved.sum()
    assert share.sum().item() == pytest.approx(1)
    constant = resample(torch.full((h * w,), 0.7, dtype=torch.float64), (h, w), (h2, w2))
    assert torch.allclose(constant, torch.full_like(constant, 0.7))
    # linear in the map, and transposing the grids transposes the result
    assert torch.allclose(resample(3 * gaze, (h, w), (h2, w2)), 3 * moved)
    turned = resample(gaze.reshape(h, w).T.flatten(), (w, h), (w2, h2))
    assert torch.allclose(turned.reshape(w2, h2).T.flatten(), moved, atol=1e-9)


@given(st.data(), sides, sides, st.integers(1, 4))
@fast
def test_mass_is_exact_from_a_grid_a_whole_number_of_times_finer(data, h, w, factor):
    gaze = data.draw(a_map(h * factor, w * factor))
    blocks = gaze.reshape(h, factor, w, factor)
    if factor == 2:  # without antialiasing, sampling points lie between the 2 x 2 cells: the exact mean of each block
        moved = resample(gaze, (h * 2, w * 2), (h, w), antialias=False)
        assert torch.allclose(moved, blocks.mean((1, 3)).flatten())
    finer = resample(gaze, (h * factor, w * factor), (h * factor * 3, w * factor * 3))
    # In the interior the triangle filter hands out all of a cell's mass: only the rim can change the sum.
    assert finer.sum().item() / 9 == pytest.approx(gaze.sum().item(), rel=1e-9)


def test_bilinear_against_a_loop():
    gaze = torch.rand(4 * 3, dtype=torch.float64)
    h, w, h2, w2 = 4, 3, 6, 7
    table = gaze.reshape(h, w)
    slow = torch.zeros(h2, w2, dtype=torch.float64)
    for i in range(h2):
        for j in range(w2):
            y, x = max((i + 0.5) * h / h2 - 0.5, 0), max((j + 0.5) * w / w2 - 0.5, 0)
            top, left = int(y), int(x)
            low, right = min(top + 1, h - 1), min(left + 1, w - 1)
            a, b = y - top, x - left
            slow[i, j] = (1 - a) * ((1 - b) * table[top, left] + b * table[top, right]) + a * (
                (1 - b) * table[low, left] + b * table[low, right]
            )
    for antialias in (True, False):
        assert torch.allclose(resample(gaze, (h, w), (h2, w2), antialias), slow.flatten(), atol=1e-12)


@pytest.mark.parametrize("antialias", [True, False])
def test_against_torch(antialias):
    gaze = torch.rand(12, 17, dtype=torch.float64)
    for target in ((5, 4), (12, 30), (31, 3), (1, 1)):
        theirs = F.interpolate(gaze[None, None], target, mode="bilinear", align_corners=False, antialias=antialias)
        assert torch.allclose(resample(gaze.flatten(), (12, 17), target, antialias), theirs.flatten(), atol=1e-12)


def test_a_lone_peak_survives_a_coarser_grid():
    peak = torch.zeros(32 * 32)
    peak[5 * 32 + 7] = 1.0
    assert resample(peak, (32, 32), (4, 4)).argmax() == 0
    assert resample(peak, (32, 32), (4, 4), antialias=False).sum() == 0  # why it is not the default


@given(st.data(), sides, sides, sides, sides)
@fast
def test_several_images_keep_their_shares(data, h, w, h2, w2):
    first, second = data.draw(a_map(h, w)), data.draw(a_map(h2, w2))
    moved = resample(torch.cat([first, second]), [(h, w), (h2, w2)], [(h2, w), (3, 5)])
    assert moved.shape == (h2 * w + 15,)
    assert moved[: h2 * w].sum().item() == pytest.approx(first.sum().item())
    assert moved[h2 * w :].sum().item() == pytest.approx(second.sum().item())
    # Each is its own interpolation, scaled.
    alone = resample(second, (h2, w2), (3, 5))
    assert torch.allclose(moved[h2 * w :], alone * second.sum() / alone.sum(), atol=1e-9)


def test_an_image_that_nobody_looked_at_stays_without_mass():
    given = torch.cat([torch.zeros(4), torch.ones(4)]).requires_grad_()
    moved = resample(given, [(2, 2), (2, 2)], [(3, 3), (3, 3)])
    assert moved[:9].abs().sum() == 0 and moved[9:].sum().item() == pytest.approx(4)
    moved.square().sum().backward()
    assert torch.isfinite(given.grad).all()


def former(gaze, source, target):
    """One image's bilinear interpolation as it was before there were tiles, written out."""
    weights = []
    for size, new in zip(source, target, strict=True):
        scale = size / new
        centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
        distance = (torch.arange(size, dtype=torch.float64) + 0.5 - centres[:, None]).abs()
        triangle = (1 - distance / max(scale, 1.0)).clamp(min=0)
        weights.append((triangle / triangle.sum(1, keepdim=True)).to(gaze))
    return (weights[0] @ gaze.reshape(source) @ weights[1].T).flatten() * 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", [(4, 5), (12, 9), (3, 3), (1, 7)])
def test_one_whole_image_is_what_it_always_was_bit_for_bit(dtype, target):
    gaze = torch.rand(3, 36, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for one in gaze:
        assert torch.equal(resample(one, (Tile(6, 6),), [Tile(*target)]), former(one, (6, 6), target))


def test_golden_values_of_one_whole_image():
    gaze = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.125, 0.75], dtype=torch.float64)
    finer, coarser = resample(gaze, Tile(2, 3), Tile(3, 4)), resample(gaze, Tile(2, 3), Tile(1, 2))
    rows = [0, 0.625, 0.71875, 0.25, 0.25, 0.4453125, 0.5390625, 0.5, 0.5, 0.265625, 0.359375, 0.75]
    assert finer.tolist() == rows and coarser.tolist() == [0.3671875, 0.5234375]  # exact in binary


def test_resample_has_gradients_and_batches():
    maps = torch.rand(2, 3, 12, dtype=torch.float64, requires_grad=True)
    for target in ((2, 2), (5, 6)):
        assert torch.autograd.gradcheck(lambda m, t=target: resample(m, (3, 4), t), (maps,))
    single = torch.stack([resample(maps[0, i], (3, 4), (2, 2)) for i in range(3)])
    assert torch.allclose(resample(maps, (3, 4), (2, 2))[0], single)


def test_resampling_for_inference_does_not_spoil_training():
    with torch.inference_mode():
        resample(torch.rand(6, dtype=torch.float64), (2, 3), (7, 5))
    leaf = torch.rand(6, dtype=torch.float64, requires_grad=True)
    resample(leaf, (2, 3), (7, 5)).sum().backward()
    assert leaf.grad.sum().item() == pytest.approx(35)


@given(st.data(), boxes, sides, sides)
@fast
def test_in_box_mass_is_a_share(data, several, h, w):
    gaze = data.draw(a_map(h, w))
    mask = boxes_to_mask(several, h, w, torch.float64)
    share = in_box_mass(gaze, mask).item()
    assert 0 <= share <= 1
    assert share + in_box_mass(gaze, 1 - mask).item() == pytest.approx(1)
    assert in_box_mass(gaze * 7, mask).item() == pytest.approx(share)
    uniform = torch.ones(h * w, dtype=torch.float64)
    assert in_box_mass(uniform, mask).item() == pytest.approx(mask.mean().item())


def test_grids_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="does not fit"):
        resample(torch.ones(5), (2, 2), (3, 3))
    with pytest.raises(ValueError, match="2 images"):
        resample(torch.ones(8), [(2, 2), (2, 2)], (3, 3))
    with pytest.raises(ValueError, match=r"images \[0, 1\] cannot be resampled to the images \[0, 2\]"):
        resample(torch.ones(8), [(2, 2), (2, 2)], [Tile(2, 2), Tile(2, 2, 2)])
    with pytest.raises(ValueError, match="1 x 1"):
        resample(torch.ones(4), (2, 2), (0, 3))
    with pytest.raises(ValueError, match="region with an area"):
        resample(torch.ones(4), (2, 2), Tile(2, 2, 0, (0.5, 0, 0.5, 1)))
    with pytest.raises(ValueError, match="at least one tile"):
        sample_mask([], [])
    with pytest.raises(ValueError, match="do not fit"):
        in_box_mass(torch.ones(4), torch.ones(5))
    with pytest.raises(ValueError, match="map with mass"):
        in_box_mass(torch.zeros(4), torch.ones(4))


# --- tiles -----------------------------------------------------------------------------------------------------------


def partition(rows, columns, h, w, image=0):
    """rows x columns crops of h x w tokens that cover an image."""
    return [
        Tile(h, w, image, (j / columns, i / rows, (j + 1) / columns, (i + 1) / rows))
        for i in range(rows)
        for j in range(columns)
    ]


few = st.integers(1, 3)


@st.composite
def a_tiling(draw, image=0, whole=True):
    """Crops, anywhere and overlapping or cut by a grid, and where they do not cover the image a tile of all of it."""
    crops = partition(draw(few), draw(few), draw(few), draw(few), image)
    if draw(st.booleans()):
        crops = []
        for _ in range(draw(few)):
            box = draw(a_box())
            crops.append(Tile(draw(few), draw(few), image, (box.x1, box.y1, box.x2, box.y2)))
        thumbnail = whole
    else:
        thumbnail = draw(st.booleans())
    found = crops + ([Tile(draw(sides), draw(sides), image)] if thumbnail else [])
    return draw(st.permutations(found))


def count(tiles):
    return sum(tile.cells for tile in tiles)


def mass_of(gaze, tiles, image):
    parts = gaze.split([tile.cells for tile in tiles], dim=-1)
    return sum(part.sum() for part, tile in zip(parts, tiles, strict=True) if tile.image == image)


def area_map(tiles):
    """The map of a light that falls evenly on the image: a token gets its cell's area."""
    shares = [(t.region[2] - t.region[0]) * (t.region[3] - t.region[1]) / t.cells for t in tiles]
    return torch.cat([torch.full((t.cells,), s, dtype=torch.float64) for t, s in zip(tiles, shares, strict=True)])


def any_map(data, tokens):
    seed = data.draw(st.integers(0, 2**31))
    gaze = torch.rand(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** 4
    return gaze + 1e-3 * (gaze == gaze.max())


@given(st.data(), a_tiling(0), a_tiling(1), a_tiling(0), a_tiling(1))
@fast
def test_every_image_keeps_its_mass_on_any_tiles(data, first, second, third, fourth):
    """Tiles of two images in any order, overlapping or not."""
    source, target = data.draw(st.permutations(first + second)), data.draw(st.permutations(third + fourth))
    gaze = any_map(data, count(source))
    moved = resample(gaze, source, target)
    assert moved.shape == (count(target),) and moved.min() >= 0
    for image in (0, 1):
        assert mass_of(moved, target, image).item() == pytest.approx(mass_of(gaze, source, image).item(), rel=1e-9)
    assert torch.equal(resample(gaze, source, source), gaze)


@given(st.data(), a_tiling(), a_tiling())
@fast
def test_tiles_are_linear_and_steps_are_single_maps(data, source, target):
    one, two = any_map(data, count(source)), any_map(data, count(source))
    maps = resample(torch.stack([one, two, 2 * one + 0.5 * two]), source, target)
    assert torch.allclose(maps[2], 2 * maps[0] + 0.5 * maps[1], rtol=1e-9, atol=1e-12)
    assert torch.allclose(maps[0], resample(one, source, target), rtol=1e-9, atol=1e-12)
    split = resample(one.reshape(1, 1, -1), source, target)
    assert split.shape == (1, 1, count(target)) and torch.allclose(split[0, 0], maps[0])


@given(few, few, few, few, sides, sides, sides, sides)
@fast
def test_what_is_even_over_the_image_stays_even(rows, columns, rows2, columns2, h, w, h2, w2):
    """Onto crops that partition the image, and a thumbnail of it: even over its area, and over the tokens too."""
    source = [*partition(rows2, columns2, w2, h), Tile(w, h2)]
    target = [*partition(rows, columns, h, w), Tile(h2, w2)]
    moved = resample(area_map(source), source, target)
    if source != target:  # a map that stays where it is keeps its own shares
        assert torch.allclose(moved, torch.full_like(moved, moved.sum() / count(target)), rtol=1e-9)
    picture = image_map(moved, target, size=(5, 7))
    assert torch.allclose(picture, torch.full_like(picture, moved.sum() / 35), rtol=1e-9)


@st.composite
def a_coarse_tile(draw):
    """Edges on quarters of the image, 1 to 3 cells a side: every cell line lies on a 24th."""
    x1, y1 = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    x2, y2 = draw(st.integers(x1 + 1, 4)), draw(st.integers(y1 + 1, 4))
    return Tile(draw(few), draw(few), 0, (x1 / 4, y1 / 4, x2 / 4, y2 / 4))


@given(st.data(), st.lists(a_coarse_tile(), min_size=1, max_size=3), st.lists(a_coarse_tile(), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_tiles_against_a_loop_over_the_image(data, source, target):
    """The rule point by point: mass of the source's cells here, shared by the density of the targets' tokens here."""
    source, target = [*source, Tile(2, 3)], [*target, Tile(3, 2)]
    gaze = any_map(data, count(source)).tolist()

    def here(tiles, x, y):
        """(index of the token over this point, how much of its cell a 24th x 24th is) of every tile there."""
        found, start = [], 0
        for tile in tiles:
            x1, y1, x2, y2 = tile.region
            if x1 < x < x2 and y1 < y < y2:
                row, column = int((y - y1) / (y2 - y1) * tile.height), int((x - x1) / (x2 - x1) * tile.width)
                cell = (x2 - x1) * (y2 - y1) / tile.cells
                found.append((start + row * tile.width + column, 1 / 24**2 / cell))
            start += tile.cells
        return found

    expected = [0.0] * count(target)
    for i in range(24):
        for j in range(24):
            x, y = (j + 0.5) / 24, (i + 0.5) / 24
            mass = sum(gaze[token] * share for token, share in here(source, x, y))
            there = here(target, x, y)
            for token, share in there:  # the share of a cell is its tile's density up to a factor
                expected[token] += mass * share / sum(other for _, other in there)
    assert resample(torch.tensor(gaze, dtype=torch.float64), source, target).tolist() == pytest.approx(expected)


@given(st.data(), few, few, few, few, boxes)
@fast
def test_crops_that_partition_an_image_are_its_grid(data, rows, columns, h, w, several):
    crops, whole = partition(rows, columns, h, w), (rows * h, columns * w)
    gaze = any_map(data, count(crops))
    grid = gaze.reshape(rows, columns, h, w).transpose(1, 2).flatten()
    assert torch.allclose(image_map(gaze, crops), grid.reshape(whole), rtol=1e-12)
    assert torch.allclose(resample(gaze, crops, whole), grid, rtol=1e-12)
    assert torch.allclose(resample(grid, whole, crops), gaze, rtol=1e-12)
    mask = sample_mask(several, crops, torch.float64).reshape(rows, columns, h, w).transpose(1, 2).flatten()
    assert torch.allclose(mask, boxes_to_mask(several, *whole, torch.float64), atol=1e-9)


@given(st.data(), few, few, few, few, st.integers(1, 3), st.integers(2, 3))
@fast
def test_boxes_along_coarse_cells_keep_their_mass(data, rows, columns, h, w, coarse, factor):
    """From crops whose cells nest in the cells of a coarse grid: what is inside a cell stays inside."""
    crops = partition(rows, columns, h * coarse * factor, w * coarse * factor)
    height, width = rows * h * coarse, columns * w * coarse
    y1, x1 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    y2, x2 = data.draw(st.integers(y1 + 1, height)), data.draw(st.integers(x1 + 1, width))
    box = Box(x1 / width, y1 / height, x2 / width, y2 / height)
    gaze = any_map(data, count(crops))
    fine = in_box_mass(gaze, sample_mask([box], crops, torch.float64)).item()
    target = [Tile(height, width)] if rows * columns > 1 else [Tile(height, width), Tile(height, width)]
    moved = resample(gaze, crops, target)
    assert in_box_mass(moved, sample_mask([box], target, torch.float64)).item() == pytest.approx(fine, abs=1e-9)
    seen = image_map(gaze, crops, size=(height, width))[y1:y2, x1:x2].sum() / gaze.sum()
    assert seen.item() == pytest.approx(fine, abs=1e-9)


@given(boxes, few, few, few, few, sides, sides)
@fast
def test_an_even_map_over_crops_and_thumbnail_has_the_boxes_area(several, rows, columns, h, w, h2, w2):
    tiles = [Tile(h2, w2), *partition(rows, columns, h, w)]
    area = boxes_to_mask(several, 1, 1, torch.float64).item()
    mask = sample_mask(several, tiles, torch.float64)
    assert in_box_mass(torch.ones(count(tiles), dtype=torch.float64), mask).item() == pytest.approx(area, abs=1e-9)
    assert in_box_mass(area_map(tiles), mask).item() == pytest.approx(area, abs=1e-9)


@given(a_box(), a_box(), few, few)
@fast
def test_a_box_is_clipped_to_a_tile_s_region(box, part, h, w):
    region = (part.x1, part.y1, part.x2, part.y2)
    wide, high = region[2] - region[0], region[3] - region[1]
    expected = []
    for i in range(h):
        for j in range(w):
            y, x = region[1] + i / h * high, region[0] + j / w * wide
            over = max(0.0, min(box.y2, y + high / h) - max(box.y1, y)) * max(
                0.0, min(box.x2, x + wide / w) - max(box.x1, x)
            )
            expected.append(over / (wide * high / h / w))
    mask = sample_mask([box], [Tile(h, w, 0, region)], torch.float64)
    assert mask.tolist() == pytest.approx(expected, abs=1e-9)


def test_boxes_and_tiles_of_several_images():
    tiles = [Tile(1, 2, 1, (0.5, 0, 1, 1)), Tile(2, 2, 0), Tile(1, 1, 1)]
    assert sample_mask([Box(0.5, 0, 0.75, 1, 1)], tiles).tolist() == [1, 0, 0, 0, 0, 0, 0.25]


def test_what_the_target_does_not_see():
    """A student that crops: the mass it cannot see goes to what it sees, and there is none where it sees nothing."""
    gaze, middle = torch.ones(4, dtype=torch.float64), Tile(1, 1, 0, (0.25, 0.25, 0.75, 0.75))
    assert resample(gaze, Tile(2, 2), middle).tolist() == pytest.approx([4.0])
    corner = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    assert resample(corner, Tile(2, 2), Tile(2, 2, 0, (0.5, 0.5, 1, 1))).sum() == 0
    # A padded crop reaches past the image: what it has there falls on nobody.
    padded = Tile(1, 2, 0, (0.5, 0, 1.5, 1))
    assert resample(torch.tensor([2.0, 6.0]), padded, Tile(1, 2)).tolist() == pytest.approx([0.0, 8.0])


def test_tiles_have_gradients():
    source = [Tile(2, 2), *partition(1, 2, 2, 1)]
    maps = torch.rand(2, count(source), dtype=torch.float64, requires_grad=True)
    for target in ([Tile(3, 2), *partition(2, 1, 1, 3)], [Tile(2, 2, 0, (0, 0, 0.5, 1))]):
        assert torch.autograd.gradcheck(lambda m, t=target: resample(m, source, t), (maps,))


def test_a_map_of_one_image_of_several():
    tiles = [Tile(2, 3, 1), Tile(1, 1, 0), *partition(2, 2, 1, 2, image=0)]
    gaze = torch.arange(15.0)
    assert image_map(gaze, tiles, 1).tolist() == [[0, 1, 2], [3, 4, 5]]  # its own grid, as it is
    found = image_map(gaze, tiles, 0)
    assert found.shape == (2, 4) and found.sum() == gaze[6:].sum()
    assert found.tolist() == [[7.75, 8.75, 9.75, 10.75], [11.75, 12.75, 13.75, 14.75]]
    assert image_map(gaze.expand(3, 15), tiles, 0, (1, 1)).tolist() == [[[float(gaze[6:].sum())]]] * 3
    with pytest.raises(ValueError, match="no tile of image 2"):
        image_map(gaze, tiles, 2)
    with pytest.raises(ValueError, match="does not fit"):
        image_map(gaze[1:], tiles, 1)


def test_pairs_stand_for_whole_images():
    assert as_tiles((2, 3)) == as_tiles([(2, 3)]) == as_tiles(Tile(2, 3)) == (Tile(2, 3),)
    assert as_tiles([(2, 3), (4, 5)]) == (Tile(2, 3, 0), Tile(4, 5, 1))
