"""Boxes to patches, grid to grid, mass in boxes: closed forms and properties."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from laavit.structures import Box
from laavit.traces.grids import boxes_to_mask, in_box_mass, resample, sample_mask

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


def test_several_images_keep_their_shares():
    first, second = torch.full((4,), 0.5), torch.full((6,), 0.25)
    moved = resample(torch.cat([first, second]), [(2, 2), (2, 3)], [(6, 6), (1, 1)])
    assert moved.shape == (37,)
    assert moved[:36].sum().item() == pytest.approx(2.0) and moved[36:].sum().item() == pytest.approx(1.5)


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
    with pytest.raises(ValueError, match="1 x 1"):
        resample(torch.ones(4), (2, 2), (0, 3))
    with pytest.raises(ValueError, match="do not fit"):
        in_box_mass(torch.ones(4), torch.ones(5))
    with pytest.raises(ValueError, match="map with mass"):
        in_box_mass(torch.zeros(4), torch.ones(4))
