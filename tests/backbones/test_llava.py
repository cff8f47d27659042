"""LLaVA's square: what centre crop and padding leave of an image; registers before the patches are the image's, too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessor, LlavaConfig, LlavaImageProcessor

from laavit.backbones.families import Llava
from laavit.model import image_blocks
from laavit.registry import UserError


def family(images: Any, tokens: int = 1, **vision: Any) -> Llava:
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, **vision},
        text_config={"model_type": "llama", "num_hidden_layers": 1},
        image_token_index=7,
    )
    processor = SimpleNamespace(image_token="<image>", image_processor=images, num_additional_image_tokens=tokens)
    return Llava(config, processor)


def crop(**more: Any) -> Any:
    return CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, **more)


def test_the_centre_is_cut_out() -> None:
    llava = family(crop(do_center_crop=True))
    assert (llava.side, llava.seen, llava.lead) == (24, 1.0, 0)
    assert llava.regions(480, 640) == [pytest.approx((0.125, 0.0, 0.875, 1.0))]  # 448 x 336, 56 left out on each side
    assert llava.regions(640, 480) == [pytest.approx((0.0, 0.125, 1.0, 0.875))]
    assert llava.regions(100, 100) == [pytest.approx((0.0, 0.0, 1.0, 1.0))]


def test_the_whole_image_is_squashed() -> None:
    images = CLIPImageProcessor(size={"height": 384, "width": 384}, do_center_crop=False)
    llava = family(images, image_size=384)  # 27 patches of 14 pixels, 6 pixels left out
    assert llava.side == 27 and llava.seen == pytest.approx(378 / 384)
    assert llava.regions(480, 640) == [pytest.approx((0.0, 0.0, 1.0, 1.0))]


def test_a_padded_image_stands_in_the_middle_of_its_square() -> None:
    images = LlavaImageProcessor(
        do_pad=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_center_crop=True
    )
    # 640 x 480 in a square of 640: above and below it 80 rows, a sixth of its height each.
    assert family(images).regions(480, 640) == [pytest.approx((0.0, -1 / 6, 1.0, 7 / 6))]


def test_registers_stand_before_the_patches_and_belong_to_the_image() -> None:
    llava = family(crop(do_center_crop=True), tokens=1 + 4, image_size=28)
    ids = torch.tensor([1, *[7] * 8, 2, *[7] * 8, 3])
    spans = llava.spans(ids, {"image_sizes": torch.tensor([[50, 50], [50, 50]])})
    assert [(span.start, span.stop, span.lead) for span in spans] == [(5, 9, 4), (14, 18, 4)]
    batch: Any = SimpleNamespace(roles=torch.zeros(1, len(ids)), spans=[spans])
    assert torch.equal(image_blocks(batch)[0], ids == 7)  # a gate closes the registers, too
    with pytest.raises(ValueError, match="15 image tokens in the sequence, 2 tiles of 2 x 2"):
        llava.spans(ids[2:], {"image_sizes": torch.tensor([[50, 50], [50, 50]])})


def test_a_tower_of_any_shape_is_refused() -> None:
    config = LlavaConfig(vision_config={"model_type": "pixtral"}, image_token_index=7)
    with pytest.raises(UserError, match="'pixtral' tower does not see images as one square"):
        Llava(config, SimpleNamespace(image_token="[IMG]"))
