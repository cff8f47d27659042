"""The released checkpoints' own sizes, without their weights: as many tiles and tokens as the processor counts."""

from __future__ import annotations

import families.internvl
import families.llava_onevision
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3Config,
    GotOcr2ImageProcessor,
    InternVLConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
)

from laavit.backbones.families import Gemma3, InternVL, LlavaOnevision

SIDES = st.integers(20, 4000)


@pytest.fixture(scope="module")
def llava() -> LlavaOnevision:
    _, processor = families.llava_onevision.build("llava_onevision", 0)
    processor.image_processor = LlavaOnevisionImageProcessor()
    processor.num_image_tokens, processor.vision_aspect_ratio = 729, "anyres_max_9"
    return LlavaOnevision(LlavaOnevisionConfig(image_token_index=7), processor)


@pytest.fixture(scope="module")
def internvl() -> InternVL:
    _, processor = families.internvl.build("internvl", 0)
    processor.image_processor = GotOcr2ImageProcessor(size={"height": 448, "width": 448}, crop_to_patches=True)
    return InternVL(InternVLConfig(), processor)


@settings(max_examples=200, deadline=None)
@given(height=SIDES, width=SIDES)
def test_llava_onevision(llava: LlavaOnevision, height: int, width: int) -> None:
    """384 px tiles of 27 x 27 tokens, 36 shapes of grid, at most some nine tiles' worth of cells."""
    count = llava.processor._get_number_of_features(height, width, 384, 384)
    base, *grids = llava.spans(torch.full((count,), 7), {"image_sizes": torch.tensor([[height, width]])})
    assert (base.tile.height, base.tile.width) == (27, 27)
    for grid in grids:
        # What unpadding leaves ends at the image's edges, to within a cell.
        left, top, right, bottom = grid.tile.region
        across, down = (right - left) / grid.tile.width, (bottom - top) / grid.tile.height
        assert abs(left) < across and abs(right - 1) < across and abs(top) < down and abs(bottom - 1) < down
        assert grid.tile.cells <= 9 * 27**2 * 1.1**2


@settings(max_examples=200, deadline=None)
@given(height=SIDES, width=SIDES)
def test_internvl3(internvl: InternVL, height: int, width: int) -> None:
    """448 px tiles of 16 x 16 tokens; at most twelve, and a thumbnail."""
    assert (internvl.side, internvl.merge, internvl.seen) == (16, 2, 1.0)
    regions = internvl.regions(height, width)
    kinds = internvl.processor.images_kwargs
    assert len(regions) == internvl.processor.image_processor.get_number_of_image_patches(height, width, kinds)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in regions]
    assert sum(areas) == pytest.approx(1 if len(regions) == 1 else 2)


def test_gemma3(llava: LlavaOnevision) -> None:
    """896 px, 64 x 64 patches averaged to 16 x 16 tokens."""
    family = Gemma3(Gemma3Config(vision_config={"image_size": 896, "patch_size": 14}), llava.processor)
    assert (family.side, family.merge, family.seen) == (16, 4, 1.0)
