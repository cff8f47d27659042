"""Vision transformers of timm and open_clip as classes of transformers, so that what is built on one is a stock model.

A plain vision transformer is the same thing in all three libraries, under other names. transformers holds one

* with a norm before its first layer and one class token in ``CLIPVisionModel``,
* without any token but the patches in ``SiglipVisionModel``,
* any other in ``Dinov2Model`` or, where several tokens stand before the patches, ``Dinov2WithRegistersModel``.

A layer scale is multiplied into the weights before it. What none of these holds (rotary positions, gated MLPs,
normalised queries, convolutions) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.activations import ACT2FN

from laavit.registry import UserError

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")
# Tables of names: patterns of one library's, and what they are in the other. timm's stand in the middle.
FROM_OPEN_CLIP = {
    r"^class_embedding": "cls_token",
    r"^positional_embedding": "pos_embed",
    r"^conv1": "patch_embed.proj",
    r"^ln_pre": "norm_pre",
    r"^ln_post": "norm",
    r"^transformer\.resblocks": "blocks",
    r"\.ln_([12])": r".norm\1",
    r"\.ls_([12])": r".ls\1",
    r"\.attn\.in_proj_": ".attn.qkv.",
    r"\.attn\.out_proj": ".attn.proj",
    r"\.mlp\.c_fc": ".mlp.fc1",
    r"\.mlp\.c_proj": ".mlp.fc2",
}
TO_CLIP = {  # and SigLIP
    r"^patch_embed\.proj": "embeddings.patch_embedding",
    r"^norm_pre": "pre_layrnorm",
    r"^norm\.": "post_layernorm.",
    r"^blocks": "encoder.layers",
    r"\.norm([12])": r".layer_norm\1",
    r"\.attn\.([qkv])\.": r".self_attn.\1_proj.",
    r"\.attn\.proj": ".self_attn.out_proj",
}
TO_DINO = {
    r"^patch_embed\.proj": "embeddings.patch_embeddings.projection",
    r"^norm\.": "layernorm.",
    r"^blocks": "encoder.layer",
    r"\.attn\.([qkv])\.": r".attention.\1_proj.",
    r"\.attn\.proj": ".attention.o_proj",
}


def prefix_tokens(config: PreTrainedConfig) -> int:
    """How many tokens stand before the patches in the states of transformers' tower: a class token, registers."""
    return 0 if config.model_type == "siglip_vision_model" else 1 + getattr(config, "num_register_tokens", 0)


def from_timm(model: Any, name: str) -> PreTrainedModel:
    """A plain vision transformer of timm as transformers' class; ``name`` is for messages.

    Raises:
        UserError: it is none.
    """
    layers = getattr(model, "blocks", None) or [None]
    if not hasattr(model, "patch_embed") or not all(hasattr(layer, "attn") for layer in layers):
        raise _refusal(model, name, "it is no plain transformer over patches")
    states = {k: v for k, v in model.state_dict().items() if not re.match(r"head|attn_pool|fc_norm", k)}
    block, side = model.blocks[0], max(model.patch_embed.img_size)
    eps, activation = getattr(block.norm1, "eps", 0.0), getattr(block.mlp, "act", torch.relu)

    def states_of(pixels: Tensor) -> Tensor:
        return model.forward_intermediates(pixels, indices=1, output_fmt="NLC", intermediates_only=True)[0]

    return _converted(model, name, states, states_of, (block.attn.num_heads, eps, activation, side))


def from_open_clip(model: Any, name: str) -> PreTrainedModel:
    """The visual tower of a CLIP model of open_clip, a transformer of its own, as transformers' class.

    Raises:
        UserError: it is none.
    """
    if not hasattr(model, "transformer") or not hasattr(model, "class_embedding"):
        raise _refusal(model, name, "it is no plain transformer over patches")
    states = {_renamed(k, FROM_OPEN_CLIP): v for k, v in model.state_dict().items()}
    states = {k: v for k, v in states.items() if not re.match(r"proj$|attn_pool", k)}
    states["cls_token"], states["pos_embed"] = states["cls_token"][None, None], states["pos_embed"][None]
    block, side = model.transformer.resblocks[0], max(model.image_size)

    def states_of(pixels: Tensor) -> Tensor:
        found = model.forward_intermediates(pixels, indices=1, output_fmt="NLC", intermediates_only=True)
        return found["image_intermediates"][0]

    return _converted(model, name, states, states_of, (block.attn.num_heads, block.ln_1.eps, block.mlp[1], side))


def _refusal(model: Any, name: str, why: str) -> UserError:
    return UserError(
        f"'{name}' ({type(model).__name__}) cannot become a tower of transformers: {why}; "
        "a folder in transformers' own format may serve (clip, dinov2, dinov3_vit, siglip)"
    )


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for pattern, other in table.items():
        name = re.sub(pattern, other, name)
    return name


def _converted(
    model: Any,
    name: str,
    states: dict[str, Tensor],
    states_of: Callable[[Tensor], Tensor],
    shape: tuple[int, float, Callable[[Tensor], Tensor], int],
) -> PreTrainedModel:
    """The stock model with a model's weights, under timm's names; it is compared with the original on one image.

    Args:
        states_of: pixels [1, 3, H, W] -> the patches' states after the last layer [1, N, D].
        shape: heads of a layer, the norms' epsilon, the MLPs' activation, pixels of an image's side.

    Raises:
        UserError: no class of transformers computes the same.
    """
    heads, eps, activation, side = shape
    grid = torch.linspace(-4, 4, 81)
    acts = [act for act in ACTIVATIONS if torch.allclose(ACT2FN[act](grid), activation(grid), atol=1e-6)]
    if not acts:
        raise _refusal(model, name, "it has another activation than GELU, its tanh form, and QuickGELU")
    if "pos_embed" not in states or "blocks.0.mlp.fc1.weight" not in states:
        raise _refusal(model, name, "it has no learned positions, or other MLPs")
    width, _, patch, _ = states["patch_embed.proj.weight"].shape
    common = {
        "hidden_size": width,
        "num_hidden_layers": len(model.blocks if hasattr(model, "blocks") else model.transformer.resblocks),
        "num_attention_heads": heads,
        "hidden_act": acts[0],
        "layer_norm_eps": eps,
        "image_size": side,
        "patch_size": patch,
    }
    first = torch.cat(
        [torch.zeros(1, 0, width), *(states.pop(k) for k in ("cls_token", "reg_token") if k in states)], 1
    )
    places = states.pop("pos_embed")
    if places.shape[1] == (side // patch) ** 2:  # the patches' alone
        places = torch.cat([torch.zeros_like(first), places], 1)
    stock, named, table = _empty(common, states, first, places)
    named |= {_renamed(key, table): value for key, value in _split(states).items()}
    fits = {key: value.shape for key, value in stock.state_dict().items()}
    odd = [key for key, value in named.items() if fits.get(key) != value.shape]
    if odd:
        raise _refusal(model, name, f"it has a part that {type(stock).__name__} lacks, or of another shape: {odd[0]}")
    stock.load_state_dict(named, strict=False)  # a bias or norm that the model has not stays neutral
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = states_of(pixels)
        found = stock.eval()(pixels, output_hidden_states=True).hidden_states[-1][:, first.shape[1] :]
    if found.shape != own.shape or (found - own).abs().max() > 1e-3 * own.abs().max():
        raise _refusal(model, name, f"it computes something else than {type(stock).__name__} with its weights")
    return stock


def _empty(
    common: dict[str, Any], states: Mapping[str, Tensor], first: Tensor, places: Tensor
) -> tuple[PreTrainedModel, dict[str, Tensor], Mapping[str, str]]:
    """A new stock model, its weights before the first layer, and the table of its other weights' names.

    Args:
        first: the tokens before the patches [1, P, D]. places: all positions [1, P + N, D].
    """
    count, inner = first.shape[1], states["blocks.0.mlp.fc1.weight"].shape[0]
    if count == 0:
        config = SiglipVisionConfig(**common, intermediate_size=inner, vision_use_head=False)
        return SiglipVisionModel(config), {"embeddings.position_embedding.weight": places[0]}, TO_CLIP
    if "norm_pre.weight" in states:
        named = {"embeddings.class_embedding": first[0, 0], "embeddings.position_embedding.weight": places[0]}
        return CLIPVisionModel(CLIPVisionConfig(**common, intermediate_size=inner)), named, TO_CLIP
    common["mlp_ratio"] = inner // common["hidden_size"]
    named = {
        "embeddings.cls_token": first[:, :1],
        "embeddings.position_embeddings": torch.cat([places[:, :1], places[:, count:]], 1),
    }
    if count == 1:
        return Dinov2Model(Dinov2Config(**common)), named, TO_DINO
    named["embeddings.register_tokens"] = (first + places[:, :count])[:, 1:]  # Dinov2 adds them after the positions
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**common, num_register_tokens=count - 1)), named, TO_DINO


def _split(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values apart; layer scales multiplied into the weights before them."""
    out: dict[str, Tensor] = {}
    for key, value in states.items():
        if ".attn.qkv." in key:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                out[key.replace("qkv", part)] = third
        elif not re.search(r"\.ls[12]\.gamma$", key):
            out[key] = value
    for key, scale in states.items():
        if found := re.match(r"(blocks\.\d+)\.ls([12])\.gamma$", key):
            part = f"{found[1]}.{'attn.proj' if found[2] == '1' else 'mlp.fc2'}"
            out[f"{part}.weight"] = out[f"{part}.weight"] * scale[:, None]
            out[f"{part}.bias"] = out[f"{part}.bias"] * scale
    return out
