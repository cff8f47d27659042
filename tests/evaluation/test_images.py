"""The image cache gives what the processor gives, and gives it once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, BatchFeature

from laavit.evaluation.images import CachedImages, images_of


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@pytest.fixture
def inner(export: Path) -> Any:
    return AutoImageProcessor.from_pretrained(export)


def test_equals_the_processor_with_unequal_sizes_and_repeats(inner: Any) -> None:
    pictures = [picture(0, (48, 32)), picture(1, (32, 64)), picture(0, (48, 32)), picture(2, (48, 32))]
    cached = CachedImages(inner, 2**20)
    for _ in range(2):  # the second time everything comes from the cache
        ours, plain = cached(pictures, return_tensors="pt"), inner(pictures, return_tensors="pt")
        assert torch.equal(ours["pixel_values"], plain["pixel_values"])
        assert torch.equal(ours["image_grid_thw"], plain["image_grid_thw"])
    assert (cached.misses, cached.hits) == (3, 5)


def test_pixels_decide_not_the_object(inner: Any) -> None:
    cached = CachedImages(inner, 2**20)
    image = picture(0, (32, 32))
    before = cached([image], return_tensors="pt")["pixel_values"]
    image.putpixel((3, 3), (255, 0, 255))
    after = cached([image], return_tensors="pt")["pixel_values"]
    assert cached.misses == 2
    assert not torch.equal(before, after)
    cached([image], return_tensors="pt", do_normalize=False)
    assert cached.misses == 3  # other settings, another entry


def test_a_palette_is_part_of_the_pixels() -> None:
    """Two indexed images of equal numbers and other colours are two images."""
    red, blue = Image.new("P", (4, 4), 1), Image.new("P", (4, 4), 1)
    red.putpalette([0, 0, 0, 255, 0, 0])
    blue.putpalette([0, 0, 0, 0, 0, 255])
    cached = CachedImages(None, 2**20)
    assert cached.digest(red) != cached.digest(blue) and cached.digest(red) == cached.digest(red.copy())


def test_least_recently_used_go_first(inner: Any) -> None:
    one = inner([picture(0, (32, 32))], return_tensors="pt")["pixel_values"].nbytes
    cached = CachedImages(inner, 2 * one)
    for seed in (0, 1, 0, 2, 0):  # 2 pushes 1 out, not 0
        cached([picture(seed, (32, 32))], return_tensors="pt")
    assert cached.misses == 3
    cached([picture(1, (32, 32))], return_tensors="pt")
    assert cached.misses == 4


def test_a_batch_larger_than_the_cache_is_served(inner: Any) -> None:
    pictures = [picture(seed, (32, 32)) for seed in range(5)]
    ours = CachedImages(inner, 1)(pictures, return_tensors="pt")
    assert torch.equal(ours["pixel_values"], inner(pictures, return_tensors="pt")["pixel_values"])


def test_a_list_a_sample(inner: Any) -> None:
    pictures = [[picture(0, (48, 32)), picture(1, (32, 64))], [], [picture(0, (48, 32))]]
    cached = CachedImages(inner, 2**20)
    for _ in range(2):
        ours, plain = cached(pictures, return_tensors="pt"), inner(pictures, return_tensors="pt")
        assert torch.equal(ours["pixel_values"], plain["pixel_values"])
        assert torch.equal(ours["image_grid_thw"], plain["image_grid_thw"])
    assert (cached.misses, cached.hits) == (2, 4)


def test_outputs_of_another_form_pass_uncached() -> None:
    given = []

    def squares(images: list[Any], **_: Any) -> BatchFeature:
        given.append(images)
        return BatchFeature({"pixel_values": torch.arange(float(len(images)))})

    cached = CachedImages(squares, 2**20)
    pictures = [picture(0, (8, 8)), picture(0, (8, 8))]
    for _ in range(2):
        assert cached(pictures)["pixel_values"].tolist() == [0.0, 1.0]
        assert cached([pictures, pictures])["pixel_values"].tolist() == [0.0, 1.0]
    assert (cached.hits, cached.misses) == (0, 0)
    assert given[1:] == [pictures, [pictures, pictures]] * 2  # as they were given, and once each after the first


def test_images_of_chats() -> None:
    def said(*parts: Any) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "image", "image": part} for part in parts]}

    plain = {"role": "system", "content": "look"}
    assert images_of([[plain, said(1, 2)], [plain], [said(3), said(4)]]) == [[1, 2], [], [3, 4]]
    assert images_of([[plain], [said()]]) == []
