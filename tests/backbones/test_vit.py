"""Towers of timm and open_clip against themselves as classes of transformers: the same states, layer by layer."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import timm
import torch
from families.parts import spread
from torch import nn
from transformers import CLIPVisionModel, Dinov2Model, Dinov2WithRegistersModel, SiglipVisionModel

from laavit.backbones.encoders import timm_model
from laavit.backbones.vit import from_open_clip, from_timm, prefix_tokens
from laavit.registry import UserError

SIZE = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
TIMM = {
    "class token": ({}, Dinov2Model, 1),
    "layer scale": ({"init_values": 0.5}, Dinov2Model, 1),
    "no bias in attention": ({"qkv_bias": False}, Dinov2Model, 1),
    "registers": ({"reg_tokens": 3, "no_embed_class": True}, Dinov2WithRegistersModel, 4),
    "registers with positions": ({"reg_tokens": 3}, Dinov2WithRegistersModel, 4),
    "registers alone": ({"reg_tokens": 2, "class_token": False, "global_pool": "avg"}, Dinov2WithRegistersModel, 2),
    "patches alone": ({"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"}, SiglipVisionModel, 0),
    "CLIP": ({"pre_norm": True, "act_layer": "quick_gelu"}, CLIPVisionModel, 1),
    "MLP of a half": ({"class_token": False, "global_pool": "avg", "mlp_ratio": 2.5}, SiglipVisionModel, 0),
}


def compare(stock: Any, states: list[torch.Tensor], pixels: torch.Tensor, rounded: bool) -> None:
    """All layers' patch states in float64; ``rounded``: float32 weights were multiplied or added to make them."""
    with torch.no_grad():
        hidden = stock.double()(pixels, output_hidden_states=True).hidden_states
    for found, own in zip(hidden[1:], states, strict=True):
        torch.testing.assert_close(
            found[:, prefix_tokens(stock.config) :], own, rtol=0, atol=1e-5 if rounded else 1e-10
        )
        assert own.std() > 0.1


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", TIMM)
def test_a_tower_of_timm(case: str, pixels: torch.Tensor) -> None:
    options, kind, prefix = TIMM[case]
    model: Any = timm.create_model("vit_tiny_patch16_224", **{**SIZE, **options})
    spread(model, 0)
    stock = from_timm(model.eval(), case)
    assert type(stock) is kind and prefix_tokens(stock.config) == prefix == model.num_prefix_tokens
    with torch.no_grad():
        states = model.double().forward_intermediates(pixels, output_fmt="NLC", intermediates_only=True)
    compare(stock, states, pixels, "init_values" in options or prefix > 1)


@pytest.mark.parametrize("more", [{}, {"no_ln_pre": True}, {"ls_init_value": 0.25}])
@pytest.mark.parametrize("quick", [False, True])
def test_a_tower_of_open_clip(more: dict[str, Any], quick: bool, pixels: torch.Tensor) -> None:
    shape = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16, **more}
    name = "ViT-B-32-quickgelu" if quick else "ViT-B-32"
    visual: Any = open_clip.create_model(name, vision_cfg=shape, text_cfg={"width": 16, "heads": 2, "layers": 1}).visual
    spread(visual, 0)
    stock = from_open_clip(visual.eval(), name)
    assert type(stock) is (Dinov2Model if "no_ln_pre" in more else CLIPVisionModel)
    assert stock.config.hidden_act == ("quick_gelu" if quick else "gelu")
    with torch.no_grad():
        found = visual.double().forward_intermediates(pixels, intermediates_only=True, output_fmt="NLC")
    compare(stock, found["image_intermediates"], pixels, "ls_init_value" in more)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, "no plain transformer over patches"),
        ("eva02_tiny_patch14_224", {"depth": 1}, "another activation than GELU"),
        ("vit_small_patch16_dinov3", {"depth": 1, "embed_dim": 32, "num_heads": 2}, "no learned positions"),
        ("vit_tiny_patch16_224", {**SIZE, "qk_norm": True}, r"a part that Dinov2Model lacks.*q_norm"),
        ("vit_tiny_patch16_224", {**SIZE, "mlp_ratio": 2.5}, r"or of another shape.*mlp\.fc1"),
        ("vit_tiny_patch16_224", {**SIZE, "pre_norm": True, "reg_tokens": 2}, "CLIPVisionModel lacks"),
        ("vit_tiny_patch16_224", {**SIZE, "img_size": (32, 48)}, "or of another shape.*position"),
    ],
)
def test_what_is_no_plain_transformer_is_refused(name: str, options: dict[str, Any], why: str) -> None:
    options = {key: value for key, value in options.items() if key != "num_classes"}
    with pytest.raises(UserError, match=f"'{name}' .* cannot become a tower of transformers: it .*{why}"):
        from_timm(timm_model(name, None, False, options).eval(), name)


def test_what_computes_something_else_is_refused() -> None:
    """A difference that no weight tells of."""
    model: Any = timm.create_model("vit_tiny_patch16_224", **SIZE)
    spread(model, 0)
    model.blocks[1].drop_path1 = nn.Tanh()
    with pytest.raises(UserError, match="it computes something else than Dinov2Model"):
        from_timm(model.eval(), "vit")
