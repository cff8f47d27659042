"""Static encoders against the libraries' own whole attention maps, in float64, one tiny random model of each kind."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from laavit.cli import run as cli_run
from laavit.registry import UserError
from laavit.structures import Sample, Tile
from laavit.teachers import ExtractSettings
from laavit.teachers.open_clip_encoder import OpenCLIPEncoder, OpenCLIPTower
from laavit.teachers.pictures import PicturePreparer
from laavit.teachers.probe import RowProbe
from laavit.teachers.static import StaticEncoder
from laavit.teachers.timm_encoder import TimmEncoder, TimmTower
from laavit.traces.filters import CorrectnessFilter
from laavit.traces.judging import judge
from laavit.traces.store import TraceStore

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = dict(embed_dim=32, depth=3, num_heads=4)
#: kind -> timm's name, pixels of a side, options
TIMM: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "dinov2": ("vit_small_patch14_dinov2", 42, TINY),
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2", 42, TINY),
    "dinov3": ("vit_small_patch16_dinov3", 64, TINY),
    "siglip": ("vit_base_patch16_siglip_224", 64, TINY),
    "vit": ("vit_base_patch16_224", None, TINY),
    "eva02": ("eva02_tiny_patch14_224", 56, TINY),  # rotary positions between fused projections of its own
}
CLIP: dict[str, Any] = dict(
    embed_dim=16,
    vision_cfg=dict(image_size=32, layers=3, width=32, head_width=8, patch_size=8),
    text_cfg=dict(context_length=8, vocab_size=50, width=16, heads=2, layers=1),
)
LAST = ExtractSettings(semantics="mean")


def randomise(model: nn.Module) -> nn.Module:
    """Weights far from zero, so that attention is not flat and nothing of a formula cancels out."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if parameter.ndim < 2 else 0.3))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One safetensors file a kind."""
    folder = tmp_path_factory.mktemp("static")
    for kind, (name, _, options) in TIMM.items():
        save_file(
            randomise(timm.create_model(name, num_classes=0, **options)).state_dict(), folder / f"{kind}.safetensors"
        )
    model = open_clip.create_model("ViT-B-16", pretrained_text=False, **CLIP)
    save_file({k: v.contiguous() for k, v in randomise(model).state_dict().items()}, folder / "clip.safetensors")
    return folder


def encoder(folder: Path, kind: str, **changes: Any) -> StaticEncoder:
    weights = str(folder / f"{kind}.safetensors")
    if kind == "clip":
        return OpenCLIPEncoder("ViT-B-16", weights, options=CLIP, **{"dtype": "float64", **changes})
    name, size, options = TIMM[kind]
    return TimmEncoder(name, weights, **{"size": size, "options": options, "dtype": "float64", **changes})


def plain_maps(teacher: StaticEncoder, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
    """Every layer's whole map as the library's unfused path computes it, [H, S, S], and the patches' last states."""
    tower, maps = teacher.tower, []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(module, nn.MultiheadAttention):
            module.forward_hooks_off = True
            q = inputs[0]
            maps.append(nn.MultiheadAttention.forward(module, q, q, q, average_attn_weights=False)[1][0])
        else:
            maps.append(inputs[0][0])  # what the dropout of attention weights is given

    hooks = []
    for attention in tower.attentions:
        if not isinstance(attention, nn.MultiheadAttention):
            attention.fused_attn = False
        watched = attention if isinstance(attention, nn.MultiheadAttention) else attention.attn_drop
        hooks.append(watched.register_forward_hook(keep))
    with torch.no_grad():
        if isinstance(tower, OpenCLIPTower):
            tokens = tower.model.ln_post(tower.model.transformer(tower.model._embeds(pixels[None])))[0]
            prefix = 1
        else:
            tokens, prefix = tower.model.forward_features(pixels[None])[0], tower.model.num_prefix_tokens
        if tower.pool is not None:
            pool = tower.pool
            query = pool.q(pool.latent)[0].unflatten(-1, (4, 8)).transpose(0, 1)  # [H, 1, D_h]
            key = pool.kv(tokens)[:, :32].unflatten(-1, (4, 8)).transpose(0, 1)
            maps = [(query @ key.transpose(1, 2) / 8**0.5).softmax(-1)]
    for hook in hooks:
        hook.remove()
    for attention in tower.attentions:
        if hasattr(attention, "fused_attn"):
            attention.fused_attn = True
    return maps, tokens[prefix:]


KINDS = [*TIMM, "clip"]


@pytest.mark.parametrize("kind", KINDS)
def test_gaze_and_semantics_equal_the_librarys_own_maps(folder: Path, kind: str, samples: list[Sample]) -> None:
    teacher = encoder(folder, kind)
    extractor = teacher.extractor(LAST)
    prepared = [extractor.preparer(sample) for sample in samples]
    for item, trace in zip(prepared, extractor(prepared), strict=True):
        gaze, states = [], []
        for picture in item.pixels:
            maps, patches = plain_maps(teacher, picture.double())
            row = sum(maps[-1][head, 0] for head in range(4)) / 4
            gaze.append(row[-len(patches) :] / len(item.pixels))
            states.append(patches)
        torch.testing.assert_close(trace.gaze, torch.cat(gaze), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(trace.semantics, torch.cat(states).mean(0), rtol=1e-9, atol=1e-10)
        assert trace.mass == pytest.approx(float(torch.cat(gaze).sum())) and trace.mass <= 1 + 1e-9
        assert (trace.mass > 1 - 1e-9) == (kind == "siglip"), "a CLS token also looks at itself"
        assert trace.answer == item.sample.answer and len(trace.tiles) == len(item.sample.images)
        assert sum(tile.cells for tile in trace.tiles) == len(trace.gaze)
        assert trace.gaze.std() > 0.01 * trace.gaze.mean(), "the map must not be flat, or it proves nothing"


@pytest.mark.parametrize("kind", ["dinov2_reg", "dinov3", "clip"])
def test_layers_heads_and_middle_states(folder: Path, kind: str, samples: list[Sample]) -> None:
    teacher = encoder(folder, kind)
    settings = replace(LAST, layers=(0, -1), heads=(1, 3), semantics="full", semantics_layer=1)
    extractor = teacher.extractor(settings)
    item = extractor.preparer(samples[0])
    (trace,) = extractor([item])
    maps, _ = plain_maps(teacher, item.pixels[0].double())
    row = sum(maps[layer][head, 0] for layer in (0, 2) for head in (1, 3)) / 4
    torch.testing.assert_close(trace.gaze, row[-len(trace.gaze) :], rtol=1e-9, atol=1e-12)
    seen: list[Tensor] = []
    blocks = teacher.tower.model.transformer.resblocks if kind == "clip" else teacher.tower.model.blocks
    hook = blocks[1].register_forward_hook(lambda *call: seen.append(call[2][0]))
    teacher.extractor(LAST)([item])
    hook.remove()
    torch.testing.assert_close(trace.semantics, seen[0][-len(trace.gaze) :], rtol=1e-12, atol=1e-12)
    assert trace.semantic_tokens is not None and trace.semantic_tokens.tolist() == list(range(len(trace.gaze)))
    pairs = teacher.extractor(replace(LAST, heads=((0, 1), (2, 3))))
    expected = (maps[0][1, 0] + maps[2][3, 0]) / 2
    torch.testing.assert_close(pairs([item])[0].gaze, expected[-len(trace.gaze) :], rtol=1e-9, atol=1e-12)


def test_semantics_pooled_and_in_rows(folder: Path, samples: list[Sample]) -> None:
    teacher = encoder(folder, "dinov2")

    def read(**changes: Any) -> Any:
        extractor = teacher.extractor(replace(LAST, **changes))
        return extractor([extractor.preparer(samples[0])])[0]

    full, rows, pooled = read(semantics="full"), read(semantics="top_k_rows", top_k=3), read(semantics="gaze")
    order = sorted(range(9), key=lambda j: -float(full.gaze[j]))[:3]
    assert rows.semantic_tokens.tolist() == order and torch.equal(rows.semantics, full.semantics[order])
    weights = full.gaze - full.gaze.min()
    expected = sum(w * s for w, s in zip(weights, full.semantics, strict=True)) / weights.sum()
    torch.testing.assert_close(pooled.semantics, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["dinov2", "siglip", "clip"])
def test_normalisations(folder: Path, kind: str, samples: list[Sample]) -> None:
    teacher = encoder(folder, kind)
    item = teacher.preparer(samples[2])  # two images
    raw = teacher.extractor(LAST)([item])[0]
    first = raw.tiles[0].cells
    one, two = raw.gaze[:first], raw.gaze[first:]
    expected = {
        "rows": torch.cat([one / one.sum(), two / two.sum()]) / 2,
        "minmax": (raw.gaze - raw.gaze.min()) / (raw.gaze.max() - raw.gaze.min() + 1e-8),
        "distribution": raw.gaze / raw.gaze.sum(),
    }
    for name, map_ in expected.items():
        trace = teacher.extractor(replace(LAST, normalisation=name))([item])[0]
        torch.testing.assert_close(trace.gaze, map_, rtol=1e-9, atol=1e-12)
        assert trace.mass == pytest.approx(raw.mass, rel=1e-12) and torch.equal(trace.semantics, raw.semantics)


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "siglip", "vit"])
def test_keeping_the_proportions_mixes_grids_in_one_batch(folder: Path, kind: str, samples: list[Sample]) -> None:
    teacher = encoder(folder, kind, aspect="keep", **({"size": 96} if kind == "vit" else {}))
    extractor = teacher.extractor(LAST)
    prepared = [extractor.preparer(sample) for sample in samples]
    traces = extractor(prepared)
    wide, tall = traces[0].tiles[0], traces[2].tiles[0]
    assert wide.width > wide.height and tall.height > tall.width and traces[2].tiles[1] == replace(wide, image=1)
    most = teacher.preparer.height * teacher.preparer.width // (teacher.tower.patch[0] * teacher.tower.patch[1])
    for item, trace in zip(prepared, traces, strict=True):
        assert all(tile.cells <= most and tile.region == (0.0, 0.0, 1.0, 1.0) for tile in trace.tiles)
        (alone,) = extractor([item])
        torch.testing.assert_close(alone.gaze, trace.gaze, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(alone.semantics, trace.semantics, rtol=1e-9, atol=1e-10)
    maps, patches = plain_maps(teacher, prepared[0].pixels[0].double())
    torch.testing.assert_close(traces[0].gaze, maps[-1].mean(0)[0, -len(patches) :], rtol=1e-9, atol=1e-12)


def test_pixels_are_the_librarys_own_transform_without_a_crop(folder: Path, pictures: list[Path]) -> None:
    teacher = encoder(folder, "dinov2")
    config = resolve_data_config({}, model=teacher.tower.model) | {"input_size": (3, 42, 42)}
    config |= {"crop_pct": 1.0, "crop_mode": "squash"}
    clip = encoder(folder, "clip")
    squash = open_clip.image_transform(32, is_train=False, resize_mode="squash")
    for path in pictures:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        torch.testing.assert_close(teacher.preparer.pixels(rgb), create_transform(**config)(rgb), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(clip.preparer.pixels(rgb), squash(rgb), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("height", [1, 3, 50, 100, 237, 4000, 30000])
@pytest.mark.parametrize("width", [1, 64, 100, 2000])
def test_any_shape_becomes_whole_patches_within_the_budget(height: int, width: int) -> None:
    preparer = PicturePreparer(96, 96, (16, 16), "keep", (0.5,) * 3, (0.5,) * 3)
    rows, columns = preparer.grid(height, width)
    assert rows >= 1 and columns >= 1 and rows * columns <= 36
    if height == width:
        assert (rows, columns) == (6, 6)
    if 1 / 4 <= height / width <= 4:
        assert rows * columns >= 18, "no more than half of the budget is given away"


def test_a_preparer_travels_without_the_model_and_names_what_it_cannot_read(folder: Path, tmp_path: Path) -> None:
    teacher = encoder(folder, "dinov2")
    data = pickle.dumps(teacher.extractor(LAST).preparer)
    assert len(data) < 1000 and pickle.loads(data) == teacher.preparer  # noqa: S301 - what data workers do
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="broken"):
        teacher.preparer(Sample("x", (tmp_path / "broken.png",), "?", "no"))
    with pytest.raises(UserError, match="'x' has no image"):
        teacher.preparer(Sample("x", (), "?", "no"))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "token"}, r"extract\.steps: 'token' needs an answer"),
        ({"blind": "teacher"}, r"extract\.blind: a static encoder answers no question"),
        ({"logits": 4}, r"extract\.logits: a static encoder predicts no words"),
        ({"layers": (3,)}, r"extract\.layers: got 3, and the teacher has 3"),
        ({"heads": (4,)}, r"extract\.heads: got 4"),
        ({"semantics_layer": -4}, r"extract\.semantics_layer: got -4, and the encoder has 3 layers"),
    ],
)
def test_settings_that_need_words_or_more_layers_are_refused(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder(folder, "dinov2").extractor(replace(LAST, **changes))


def test_a_pool_is_one_layer(folder: Path) -> None:
    with pytest.raises(UserError, match=r"extract\.layers: vit_base_patch16_siglip_224 has no CLS token"):
        encoder(folder, "siglip").extractor(replace(LAST, layers=(-1,)))


def test_weights_are_never_random(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"teacher\.weights: give a \.safetensors file, or teacher\.pretrained"):
        TimmEncoder("vit_small_patch14_dinov2")
    with pytest.raises(UserError, match=r"teacher\.weights: give a \.safetensors file, or teacher\.pretrained"):
        OpenCLIPEncoder("ViT-B-16")
    with pytest.raises(UserError, match=r"there is no file 'gone\.safetensors'"):
        TimmEncoder("vit_small_patch14_dinov2", weights="gone.safetensors")
    with pytest.raises(UserError, match="and no other format"):
        TimmEncoder("vit_small_patch14_dinov2", weights="weights.pth")
    with pytest.raises(UserError, match="vit_small_patch14_dinov2 cannot be read from"):
        TimmEncoder("vit_small_patch14_dinov2", weights=str(folder / "vit.safetensors"))
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read from"):
        TimmEncoder("vit_small_patch14_dinov2", weights=str(tmp_path / "torn.safetensors"))
    with pytest.raises(UserError, match="ViT-B-16 cannot be read from"):
        OpenCLIPEncoder("ViT-B-16", weights=str(folder / "vit.safetensors"), options=CLIP)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"vit_small_patch14_dinov2\.lvd142m cannot be read from the hub"):
        TimmEncoder("vit_small_patch14_dinov2.lvd142m", pretrained=True)


def test_names_that_the_libraries_do_not_have(folder: Path) -> None:
    weights = str(folder / "vit.safetensors")
    with pytest.raises(UserError, match=r"no model 'vit_small_patch14_dinov4'; near: .*vit_small_patch14_dinov2"):
        TimmEncoder("vit_small_patch14_dinov4", pretrained=True)
    with pytest.raises(UserError, match=r"open_clip has no model 'ViT-B-17'; near: .*ViT-B-16"):
        OpenCLIPEncoder("ViT-B-17", pretrained="openai")
    with pytest.raises(UserError, match="open_clip has no weights 'laion3b' of ViT-B-16; near: "):
        OpenCLIPEncoder("ViT-B-16", pretrained="laion3b")
    with pytest.raises(UserError, match="no plain vision transformer"):
        TimmEncoder("resnet18", weights)
    with pytest.raises(UserError, match=r"teacher\.size: 50 x 50 px is no whole number of patches"):
        encoder(folder, "vit", size=50)
    with pytest.raises(UserError, match=r"teacher\.aspect: got 'crop'; allowed: keep, squash"):
        encoder(folder, "vit", aspect="crop")


def test_models_that_look_nowhere_are_refused() -> None:
    pooled = timm.create_model("vit_base_patch16_siglip_gap_224", num_classes=0, **TINY)
    with pytest.raises(UserError, match="a gaze cannot be read off it"):
        TimmTower(pooled)
    with pytest.raises(UserError, match="no plain vision transformer"):
        TimmTower(timm.create_model("resnet18"))
    coca = {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2}}
    model = open_clip.create_model("ViT-B-16", pretrained_text=False, **coca)
    with pytest.raises(UserError, match="attentional pooler"):
        OpenCLIPTower(model.visual)


def test_attention_that_cannot_be_probed_is_an_error() -> None:
    with pytest.raises(UserError, match=r"the attention of Linear .layer 0. does not go through"):
        linear = nn.Linear(2, 2)
        with RowProbe({0: linear}):
            linear(torch.ones(2))
    assert not linear._forward_hooks and not linear._forward_pre_hooks


def test_a_timm_tower_inside_open_clip(folder: Path, samples: list[Sample], tmp_path: Path) -> None:
    """open_clip's SigLIP models are timm's: the pool's row, whatever the library."""
    vision = dict(image_size=160, timm_model_name="test_vit", timm_pool="token", timm_proj="linear")
    options = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": CLIP["text_cfg"]}
    model = randomise(open_clip.create_model("ViT-B-16-SigLIP", pretrained_text=False, **options))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    teacher = OpenCLIPEncoder("ViT-B-16-SigLIP", str(tmp_path / "w.safetensors"), options=options, dtype="float64")
    assert isinstance(teacher.tower, TimmTower)
    (trace,) = teacher.extractor(LAST)([teacher.preparer(samples[0])])
    assert trace.tiles == (Tile(10, 10),) and 0 < trace.mass < 1


def test_an_open_clip_tower_at_another_size(folder: Path, samples: list[Sample]) -> None:
    teacher = encoder(folder, "clip", size=48)  # positions are resampled by the library
    item = teacher.preparer(samples[0])
    (trace,) = teacher.extractor(LAST)([item])
    maps, patches = plain_maps(teacher, item.pixels[0].double())
    assert trace.tiles == (Tile(6, 6),) and len(patches) == 36
    torch.testing.assert_close(trace.gaze, maps[-1].mean(0)[0, -36:], rtol=1e-9, atol=1e-12)


def test_the_card_says_what_was_read(folder: Path) -> None:
    card = encoder(folder, "dinov2").card()
    assert card["teacher"] == "vit_small_patch14_dinov2" and (card["width"], card["depth"]) == (32, 3)
    assert card["static"] == "cls" and encoder(folder, "siglip").card()["static"] == "pool"
    assert len(card["weights_sha256"]) == 64 and '"aspect": "squash"' in card["image_processor"]
    assert card["weights_sha256"] != encoder(folder, "dinov2_reg").card()["weights_sha256"]
    teacher = encoder(folder, "clip")
    assert not teacher.tower.model.training and not any(p.requires_grad for p in teacher.tower.model.parameters())
    assert not hasattr(teacher.tower.model, "token_embedding"), "the text tower is not kept"


def test_the_named_encoders_exist_where_they_are_looked_for() -> None:
    """Their names, their weights' names and the grids of their own sizes, without reading any weights."""
    named = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "registry" / "teachers").glob("*.yaml")}
    static = {name: part for name, part in named.items() if part["type"] in ("TimmEncoder", "OpenCLIPEncoder")}
    assert len(static) >= 15 and {"dinov2_base", "dinov2_reg_base", "dinov3_base", "siglip_base"} <= set(static)
    known, pairs = timm.list_models(pretrained=True), open_clip.list_pretrained()
    for name, part in static.items():
        args = part["args"]
        assert part["description"] and part["source"].startswith("https://")
        if part["type"] == "OpenCLIPEncoder":
            assert (args["path"], args["pretrained"]) in pairs, name
            continue
        assert args["path"] in known and args["pretrained"] is True, name
        size = timm.get_pretrained_cfg(args["path"]).input_size[1]
        assert size % int(re.search(r"patch(\d+)", args["path"])[1]) == 0, name


# --- from images to a trained step --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dinov2", "siglip"])
def test_a_student_trains_on_a_static_encoders_traces(folder: Path, own_project: Path, kind: str) -> None:
    """The control of a recipe is one changed line: another teacher. The targets take its width from the header."""
    name, size, options = TIMM[kind]
    teacher = dict(type="TimmEncoder", path=name, weights=str(folder / f"{kind}.safetensors"), size=size)
    teacher |= dict(options=options, aspect="keep", device="cpu")
    lines = own_project.read_text().splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.startswith("teacher = ")]
    lines[place] = f"teacher = {teacher!r}"
    own_project.write_text("\n".join(lines))
    assert cli_run("extract", [str(own_project)]) == 0
    store = TraceStore(own_project.parent / "traces")
    assert len(store) == 6 and store.header["width"] == 32
    assert store.header["static"] == ("pool" if kind == "siglip" else "cls")
    with pytest.raises(UserError, match="a static encoder's, which gives no answer"):
        judge(store, [], "correctness", CorrectnessFilter())
    assert {trace.answer for trace in store} == {"blue", "no"} and store[0].semantics.shape == (32,)
    assert len({trace.tiles for trace in store}) > 1, "the images keep their proportions"
    run = own_project.parent / "run"
    assert cli_run("train", [str(own_project), "--train.steps", "2", "--work-dir", str(run)]) == 0
    losses = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    concept = [line[key] for line in losses for key in line if "concept" in key]
    assert concept and all(0 < float(value) < 2 for value in concept)
