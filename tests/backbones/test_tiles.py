"""Families that cut images up: which part of an image each token looks at, followed through processor and model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from laavit.attention import AttentionContext
from laavit.backbones import Backbone, PromptSettings, collate
from laavit.backbones.vision_cache import VisionCache
from laavit.gates import ConstantGate
from laavit.model import gate_paths
from laavit.registry import UserError
from laavit.structures import Encoded, Role, Sample, Span

FAMILIES = ("llava_onevision", "internvl", "gemma3")
PAN_AND_SCAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 16,
    "pan_and_scan_max_num_crops": 3,
    "pan_and_scan_min_ratio_to_activate": 1.3,
}


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Backbone]:
    """Tiny float64 backbones, opened once; ``gemma3`` also with pan-and-scan."""
    folders: dict[str, Path] = {}
    made: dict[tuple[str, bool], Backbone] = {}

    def backbone(family: str, crops: bool = False) -> Backbone:
        if family not in folders:
            folders[family] = tiny(family, tmp_path_factory.mktemp(family))
        if (family, crops) not in made:
            found = Backbone.load(str(folders[family]), dtype="float64")
            found.family.set_images(PAN_AND_SCAN if crops else {})
            made[family, crops] = found
        return made[family, crops]

    return backbone


def prompt(backbone: Backbone, *images: Image.Image, order: str = "image_first") -> Encoded:
    sample = Sample("s", tuple(Path(str(i)) for i in range(len(images))), "What is left of it?", "blue")
    return backbone.builder(PromptSettings(system="Look.", order=order)).prompt_of(sample, images)


def ramp(width: int, height: int) -> Image.Image:
    """Red tells how far right a pixel is, green how far down."""
    across, down = (255 * (np.arange(side) + 0.5) / side for side in (width, height))
    pixels = np.stack([*np.meshgrid(across, down), np.zeros((height, width))], -1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def looked_at(backbone: Backbone, images: Sequence[Image.Image]) -> Tensor:
    """What a token would see of ``ramp`` if towers only averaged pixels: x and y of every image token [N, 2].

    The processor's tiles are averaged by patches; merging, unpadding and packing are the model's own code.
    """
    family, config, model = backbone.family, backbone.model.config, backbone.model.model
    kinds = {**getattr(backbone.processor, "images_kwargs", {}), "do_normalize": False, "return_tensors": "pt"}
    output = backbone.processor.image_processor([list(images)], **kinds)
    pixels = output["pixel_values"][..., :2, :, :].double()
    patch = config.vision_config.patch_size
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    tiles = torch.nn.functional.avg_pool2d(pixels.flatten(0, -4), patch)  # [tiles, 2, rows, columns]
    if config.model_type == "gemma3":
        return torch.nn.functional.avg_pool2d(tiles, family.merge).flatten(2).transpose(1, 2).flatten(0, 1)
    if config.model_type == "internvl":
        shuffled = model.pixel_shuffle(tiles.permute(0, 2, 3, 1).contiguous(), config.downsample_ratio)
        return shuffled.unflatten(3, (-1, 2)).mean(3).flatten(0, 2)
    features = list(tiles.flatten(2).transpose(1, 2).split([pixels.shape[1]] * len(pixels)))
    newline = torch.full((2,), torch.nan, dtype=torch.float64)
    packed, _ = model.pack_image_features(features, output["image_sizes"], newline, config.vision_aspect_ratio)
    return torch.cat(packed)


def centres(span: Span) -> tuple[Tensor, Tensor]:
    """The middles of a span's cells [cells, 2], and which cells lie within the image."""
    left, top, right, bottom = span.tile.region
    x = left + (torch.arange(span.tile.width, dtype=torch.float64) + 0.5) / span.tile.width * (right - left)
    y = top + (torch.arange(span.tile.height, dtype=torch.float64) + 0.5) / span.tile.height * (bottom - top)
    points = torch.stack([x.repeat(len(y)), y.repeat_interleave(len(x))], 1)
    half = torch.tensor([(right - left) / span.tile.width, (bottom - top) / span.tile.height]) / 2
    return points, ((points - half > -1e-9) & (points + half < 1 + 1e-9)).all(1)


SIZES = [(72, 70), (200, 60), (60, 200), (90, 64), (37, 150), (340, 330), (20, 20)]


@pytest.mark.parametrize(("family", "crops"), [(name, False) for name in FAMILIES] + [("gemma3", True)])
@pytest.mark.parametrize("size", SIZES)
def test_a_token_looks_where_its_tile_says(
    opened: Callable[..., Backbone], family: str, crops: bool, size: tuple[int, int]
) -> None:
    backbone = opened(family, crops)
    encoded = prompt(backbone, ramp(*size))
    tokens = (encoded.input_ids == backbone.family.image_token_id).nonzero().flatten()
    seen = torch.full((len(encoded.input_ids), 2), torch.nan, dtype=torch.float64)
    seen[tokens] = looked_at(backbone, [ramp(*size)])
    inside = 0
    for span in encoded.spans:
        points, within = centres(span)
        found = seen[span.positions()]
        assert torch.isfinite(found).all()  # no cell is a newline
        # A quarter of a cell: tiles of LLaVA-OneVision leave out pixels between them, ramps have 256 steps.
        cell = torch.tensor([abs(span.tile.region[2] - span.tile.region[0]) / span.tile.width,
                             abs(span.tile.region[3] - span.tile.region[1]) / span.tile.height])  # fmt: skip
        assert ((found - points).abs() <= 0.25 * cell + 0.006)[within].all()
        inside += int(within.sum())
    assert inside >= 0.6 * sum(span.tile.cells for span in encoded.spans)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_images_look_where_their_tiles_say(opened: Callable[..., Backbone], family: str) -> None:
    backbone = opened(family)
    images = [ramp(90, 40), ramp(40, 100)]
    encoded = prompt(backbone, *images)
    seen = torch.full((len(encoded.input_ids), 2), torch.nan, dtype=torch.float64)
    seen[encoded.input_ids == backbone.family.image_token_id] = looked_at(backbone, images)
    assert [span.tile.image for span in encoded.spans] == sorted(span.tile.image for span in encoded.spans)
    assert {span.tile.image for span in encoded.spans} == {0, 1}
    for span in encoded.spans:
        points, within = centres(span)
        assert within.any()
        assert ((seen[span.positions()] - points).abs() < 0.04)[within].all()


@pytest.mark.parametrize(("family", "crops"), [(name, False) for name in FAMILIES] + [("gemma3", True)])
@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(6, 260), st.integers(6, 260)), min_size=1, max_size=3))
def test_spans_and_separators_are_the_image_tokens(
    opened: Callable[..., Backbone], family: str, crops: bool, sizes: list[tuple[int, int]]
) -> None:
    """Against the processor's own count of tokens: nothing is left over but newlines, nothing is counted twice."""
    backbone = opened(family, crops)
    encoded = prompt(backbone, *(Image.new("RGB", size) for size in sizes))
    tokens = (encoded.input_ids == backbone.family.image_token_id).nonzero().flatten().tolist()
    cells = torch.cat([span.positions() for span in encoded.spans]).tolist()
    assert cells == sorted(set(cells)) and set(cells) <= set(tokens)
    newlines = set()
    if family == "llava_onevision":
        if len(sizes) > 1:
            newlines = {span.stop for span in encoded.spans}
        elif len(encoded.spans) == 1:  # of a sliver's grid unpadding leaves newlines alone
            newlines = {p for p in tokens if p >= encoded.spans[0].stop}
        else:
            newlines = {s.start + r * s.stride + s.tile.width for s in encoded.spans[1:] for r in range(s.tile.height)}
    assert set(tokens) - set(cells) == newlines
    assert ((encoded.roles == Role.IMAGE).nonzero().flatten().tolist()) == cells


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (2, 3000), (6, 25)])
def test_slivers_of_images_are_read(opened: Callable[..., Backbone], family: str, size: tuple[int, int]) -> None:
    backbone = opened(family)
    encoded = prompt(backbone, Image.new("RGB", size))
    assert sum(span.tile.cells for span in encoded.spans) >= 4
    states = backbone.forward(collate([encoded], backbone.family, backbone.tokenizer.pad_token_id))
    assert bool(torch.isfinite(states).all())


@pytest.mark.parametrize(("family", "crops"), [(name, False) for name in FAMILIES] + [("gemma3", True)])
def test_features_by_image_are_those_of_the_tiles(opened: Callable[..., Backbone], family: str, crops: bool) -> None:
    """[N_i, D] an image of a batch with unequal tile counts, as alone; handed back they give the same states."""
    backbone = opened(family, crops)
    many = [prompt(backbone, noise(90, 40), noise(70, 70, 1)), prompt(backbone, noise(60, 200, 2))]
    batched = backbone.family.batch([item.vision for item in many])
    together = backbone.family.image_features(backbone.model, batched)
    alone = [f for item in many for f in backbone.family.image_features(backbone.model, item.vision)]
    assert [len(f) for f in together] == [len(f) for f in alone] and len(alone) == 3
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    tokens = [int((item.input_ids == backbone.family.image_token_id).sum()) for item in many]
    assert tokens == [len(alone[0]) + len(alone[1]), len(alone[2])]
    batch = collate(many, backbone.family, backbone.tokenizer.pad_token_id)
    states = backbone.forward(batch)
    batch.features = [torch.cat(alone[:2]), alone[2]]
    torch.testing.assert_close(backbone.forward(batch), states, rtol=1e-9, atol=1e-9)


def test_a_count_that_does_not_fit_is_refused(opened: Callable[..., Backbone]) -> None:
    for family in FAMILIES:
        backbone = opened(family)
        encoded = prompt(backbone, noise(90, 40))
        first = encoded.spans[0].start
        cut = torch.cat([encoded.input_ids[:first], encoded.input_ids[first + 1 :]])
        with pytest.raises(ValueError, match="image tokens in the sequence"):
            backbone.family.spans(cut, encoded.vision)
        torn = encoded.input_ids.clone()
        torn[first + 1], torn[-1] = torn[-1].item(), torn[first + 1].item()
        with pytest.raises(ValueError, match="not contiguous"):
            backbone.family.spans(torn, encoded.vision)


# --- LLaVA-OneVision --------------------------------------------------------------------------------------------------


def test_newlines_are_the_learned_embedding(opened: Callable[..., Backbone]) -> None:
    backbone = opened("llava_onevision")
    for images in ([noise(200, 60)], [noise(90, 40), noise(60, 60, 1)]):
        encoded = prompt(backbone, *images)
        features = torch.cat(backbone.family.image_features(backbone.model, encoded.vision))
        tokens = (encoded.input_ids == backbone.family.image_token_id).nonzero().flatten()
        newline = (features == backbone.model.model.image_newline).all(1)
        cells = torch.isin(tokens, torch.cat([span.positions() for span in encoded.spans]))
        assert torch.equal(newline, ~cells) and newline.any()


def test_unpadding_by_hand(opened: Callable[..., Backbone]) -> None:
    """A 144 x 36 image: 3 tiles side by side would hold 108 x 36 of it; its 27 rows stand 4 px below the top."""
    backbone = opened("llava_onevision")
    base, grid = prompt(backbone, noise(144, 36)).spans
    assert (base.tile.height, base.tile.width, base.tile.region) == (4, 4, (0, 0, 32 / 36, 32 / 36))
    # 12 cells across, 4 down; 4 * (108 / 144 * 36) / 36 = 3 rows of them hold the image: no whole row is padding.
    assert (grid.start, grid.tile.height, grid.tile.width, grid.stride) == (base.stop, 4, 12, 13)
    assert grid.tile.region == pytest.approx((0, -4 / 27, 104 / 108, (32 - 4) / 27))
    _, thin = prompt(backbone, noise(144, 12)).spans  # 9 px of 36, 13 above: one row of cells of each side is cut off
    assert (thin.tile.height, thin.tile.width) == (2, 12)
    assert thin.tile.region == pytest.approx((0, (8 - 13) / 9, 104 / 108, (24 - 13) / 9))
    _, tall = prompt(backbone, noise(12, 144)).spans
    assert (tall.tile.height, tall.tile.width, tall.stride) == (12, 2, 3)


def test_a_grid_of_too_many_cells_shrinks(opened: Callable[..., Backbone]) -> None:
    """3 x 3 tiles: 144 cells, and anyres_max_4 allows 64: sqrt(144 / 64) = 1.5, 12 / 1.5 = 8."""
    grid = prompt(opened("llava_onevision"), noise(340, 340)).spans[1].tile
    assert (grid.height, grid.width) == (8, 8) and grid.region == pytest.approx((0, 0, 104 / 108, 104 / 108))


def test_several_images_have_base_tiles_only(opened: Callable[..., Backbone]) -> None:
    """Each is padded to a square: a token may look past the image."""
    encoded = prompt(opened("llava_onevision"), noise(90, 45), noise(40, 40))
    wide, square = encoded.spans
    assert len(encoded.vision["pixel_values"][0]) == 1
    assert wide.tile.region == pytest.approx((0, -22 / 45, 8 / 9, (80 - 22) / 45))
    assert square.tile.region == pytest.approx((0, 0, 8 / 9, 8 / 9))


# --- InternVL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "columns", "rows"), [((64, 32), 2, 1), ((30, 95), 1, 3), ((64, 64), 2, 2), ((20, 20), 1, 1)]
)
def test_tiles_and_a_thumbnail(opened: Callable[..., Backbone], size: tuple[int, int], columns: int, rows: int) -> None:
    tiles = [span.tile for span in prompt(opened("internvl"), noise(*size)).spans]
    wanted = [(c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r in range(rows) for c in range(columns)]
    assert [tile.region for tile in tiles] == wanted + ([(0, 0, 1, 1)] if len(wanted) > 1 else [])


def test_the_number_of_tiles_is_a_setting(opened: Callable[..., Backbone], tmp_path: Path) -> None:
    folder = str(tiny("internvl", tmp_path))
    for images, count in (({"max_patches": 2}, 3), ({"crop_to_patches": False}, 1), ({}, 4)):
        assert len(prompt(Backbone.load(folder, images=images), noise(96, 32)).spans) == count
    for images, said in (
        ({"max_patches": 0}, "images.max_patches: got 0; allowed: a positive int"),
        ({"crop_to_patches": 1}, "images.crop_to_patches: got 1; allowed: a bool"),
        ({"max_patch": 3}, "InternVL has no setting 'max_patch'.*did you mean 'max_patches'"),
    ):
        with pytest.raises(UserError, match=said):
            opened("internvl").family.set_images(images)


# --- Gemma 3 ----------------------------------------------------------------------------------------------------------


def test_pan_and_scan(opened: Callable[..., Backbone]) -> None:
    assert [s.tile.region for s in prompt(opened("gemma3"), noise(100, 40)).spans] == [(0, 0, 1, 1)]
    backbone = opened("gemma3", True)
    regions = [span.tile.region for span in prompt(backbone, noise(100, 40)).spans]
    assert regions == [(0, 0, 1, 1), (0, 0, 0.34, 1), (0.34, 0, 0.68, 1), (0.68, 0, 1, 1)]
    regions = [span.tile.region for span in prompt(backbone, noise(40, 60)).spans]
    assert regions == [(0, 0, 1, 1), (0, 0, 1, 0.5), (0, 0.5, 1, 1)]
    assert len(prompt(backbone, noise(40, 44)).spans) == 1


def test_image_tokens_see_all_of_their_image(opened: Callable[..., Backbone]) -> None:
    """Bidirectional within a tile, causal elsewhere: recorded rows of image tokens are eager's, in every layer."""
    backbone = opened("gemma3", True)
    items = [prompt(backbone, noise(100, 40)), prompt(backbone, noise(40, 44, 1), noise(30, 30, 2))]
    batch = collate(items, backbone.family, backbone.tokenizer.pad_token_id)
    rows = torch.tensor([[s.start + 2 for s in item.spans][:2] + [len(item.input_ids) - 1] for item in items])
    context = AttentionContext(rows=rows, heads="each")
    backbone.forward(batch, context)
    backbone.model.set_attn_implementation({"text_config": "plain", "vision_config": "sdpa"})
    try:
        maps = _maps(backbone, batch)
    finally:
        backbone.model.set_attn_implementation({"text_config": "laavit", "vision_config": "sdpa"})
    assert set(context.recorded) == {0, 1, 2}
    for layer, full in enumerate(maps):
        wanted = full.gather(2, rows[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3]))
        torch.testing.assert_close(context.recorded[layer], wanted, rtol=1e-9, atol=1e-12)
    first = context.recorded[1][0].mean(0)  # the full layer
    span = items[0].spans[0]
    assert (first[0, span.start : span.stop] > 0).all() and (first[0, span.stop :] == 0).all()
    assert (context.recorded[0][0, :, 2, : span.start] == 0).all()  # the window has left the first image behind


def _maps(backbone: Backbone, batch: Any) -> tuple[Tensor, ...]:
    vision = backbone.family.inputs(batch.vision) | backbone.family.text_inputs(batch.input_ids)
    out = backbone.model.model(input_ids=batch.input_ids, use_cache=False, output_attentions=True, **vision)
    return tuple(out.attentions)


# --- what a gate closes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "crops"), [(name, False) for name in FAMILIES] + [("gemma3", True)])
def test_a_closed_gate_leaves_no_way_around(opened: Callable[..., Backbone], family: str, crops: bool) -> None:
    """Chat markup after an image carries it past a closed answer, as the question does; it is Role.OTHER, which
    question->image closes too. Newlines and tile markers count as image. Then no answer depends on any pixel."""
    backbone = opened(family, crops)
    states = {}
    for paths in (("answer->image",), ("answer->image", "question->image")):
        for seed in (0, 1):
            items = [
                prompt(backbone, noise(200, 60, seed)),
                prompt(backbone, noise(40, 44, seed), noise(90, 30, seed)),
            ]
            items = [backbone.builder(PromptSettings()).with_answer(item, "blue") for item in items]
            batch = collate(items, backbone.family, backbone.tokenizer.pad_token_id)
            gates = gate_paths(ConstantGate(0.0, paths), 0, batch, backbone.depth)
            answers = batch.roles == Role.ANSWER
            states[paths, seed] = backbone.forward(batch, AttentionContext(paths=gates))[answers]
    alone, both = (("answer->image",), ("answer->image", "question->image"))
    assert (states[alone, 0] - states[alone, 1]).abs().max() > 1e-3
    torch.testing.assert_close(states[both, 0], states[both, 1], rtol=1e-10, atol=1e-10)


# --- cached features --------------------------------------------------------------------------------------------------


def test_the_vision_cache_knows_what_features_depend_on(opened: Callable[..., Backbone], tmp_path: Path) -> None:
    """The projector's weights, how many images a sample has (LLaVA-OneVision), the processor's own settings (Gemma 3);
    and nothing before the decoder may learn."""
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for seed, file in enumerate(files):
        noise(90, 40, seed).save(file)
    llava = opened("llava_onevision")
    builder = llava.builder(PromptSettings())
    one, two = (builder.prompt_of(Sample("s", images, "what?", "no")) for images in ((files[0],), tuple(files)))
    with pytest.raises(UserError, match=r"image_newline learns, freeze it|vision_tower.* learns, freeze it"):
        VisionCache(tmp_path, llava)
    llava.model.requires_grad_(False)
    cache = VisionCache(tmp_path, llava)
    for encoded in (one, two, one):
        wanted = torch.cat(llava.family.image_features(llava.model, encoded.vision))
        torch.testing.assert_close(cache.features(encoded), wanted, rtol=0, atol=0)
    newline = llava.model.model.image_newline
    newline.add_(1.0)
    assert VisionCache(tmp_path, llava).namespace != cache.namespace
    newline.sub_(1.0)
    for family in ("internvl", "gemma3"):
        opened(family).model.requires_grad_(False)
    opened("gemma3", True).model.requires_grad_(False)
    assert VisionCache(tmp_path, opened("gemma3")).namespace != VisionCache(tmp_path, opened("gemma3", True)).namespace
