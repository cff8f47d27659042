"""Vision towers by name (of timm, of open_clip, a folder in transformers' format), each as a class of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL.Image import Resampling
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PreTrainedModel,
    SiglipVisionModel,
)

from laavit.backbones.encoders import local_weights, open_clip_model, timm_model
from laavit.backbones.loading import reading
from laavit.backbones.vit import from_open_clip, from_timm
from laavit.registry import UserError, nearest

#: the ``model_type`` of a folder, of a tower or of a whole CLIP, and its tower's class
CLASSES: dict[str, type[PreTrainedModel]] = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "dinov3_vit": DINOv3ViTModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}


@dataclass(frozen=True)
class Tower:
    """A vision tower of transformers, and how it wants its images.

    Args:
        model: the tower. mean, std: of the channels of its pixels. resample: PIL's number of how images are scaled.
    """

    model: PreTrainedModel
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    @property
    def side(self) -> int:
        """Pixels of an image's side."""
        return int(self.model.config.image_size)

    @property
    def patch(self) -> int:
        """Pixels of a patch's side."""
        return int(self.model.config.patch_size)


def open_tower(
    name: str,
    weights: str | None = None,
    pretrained: bool = True,
    size: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Tower:
    """A tower by name: 'timm:NAME', 'open_clip:MODEL/WEIGHTS', or a folder or hub name in transformers' format.

    Args:
        weights: a local .safetensors file for a tower of timm or open_clip, in place of the hub's.
        pretrained: read trained weights; False leaves the tower random.
        size: pixels of an image's side, a multiple of the patch; None is the tower's own.
        options: further arguments of timm's or open_clip's ``create_model``.

    Raises:
        UserError: there is no such tower or file, it is no plain vision transformer, or it cannot take that size.
    """
    library, _, rest = name.partition(":")
    local = local_weights(weights, "student.weights") if weights else None
    if library == "timm":
        return _timm(rest, local, pretrained, size, options or {})
    if library == "open_clip":
        return _open_clip(rest, local, pretrained, size, options)
    if weights or options:
        raise UserError(f"student.tower: '{name}' takes no weights or options; timm:NAME and open_clip:NAME do")
    return _folder(name, pretrained, size)


def _check_size(size: int | None, patch: Any, name: str) -> None:
    side = int(patch if isinstance(patch, int) else patch[0])
    if size is not None and (size < side or size % side):
        raise UserError(f"student.image_size: got {size}; '{name}' takes multiples of its patch, {side}")


def _timm(name: str, weights: str | None, pretrained: bool, size: int | None, options: Mapping[str, Any]) -> Tower:
    model: Any = timm_model(name, weights, pretrained, options if size is None else {"img_size": size, **options})
    _check_size(size, getattr(getattr(model, "patch_embed", None), "patch_size", 1), name)
    return _tower(from_timm(model.eval(), name), model.pretrained_cfg)


def _open_clip(
    name: str, weights: str | None, pretrained: bool, size: int | None, options: Mapping[str, Any] | None
) -> Tower:
    model_name, _, tag = name.partition("/")
    if pretrained and not tag and not weights:
        raise UserError(f"student.tower: 'open_clip:{name}' names no weights; write open_clip:{name}/WEIGHTS")
    model: Any = open_clip_model(model_name, weights, tag if pretrained and not weights else None, size, options)
    from open_clip import get_model_preprocess_cfg

    visual = model.visual.eval()
    embedding = getattr(getattr(visual, "trunk", None), "patch_embed", visual)
    _check_size(size, getattr(embedding, "patch_size", 1), name)
    stock = from_timm(visual.trunk, name) if hasattr(visual, "trunk") else from_open_clip(visual, name)
    return _tower(stock, get_model_preprocess_cfg(model))


def _tower(stock: PreTrainedModel, images: Mapping[str, Any]) -> Tower:
    """With timm's or open_clip's description of what becomes of images."""
    return Tower(stock, tuple(images["mean"]), tuple(images["std"]), int(Resampling[images["interpolation"].upper()]))


def _folder(path: str, pretrained: bool, size: int | None) -> Tower:
    with reading(path, "vision tower") as place:
        config: Any = AutoConfig.from_pretrained(place)
        kind = CLASSES.get(config.model_type)
        if kind is None:
            raise UserError(f"it is of type '{config.model_type}'; {nearest(config.model_type, CLASSES)}")
        config = getattr(config, "vision_config", config)
        if size is not None and config.model_type == "dinov3_vit":  # its positions are angles, and follow the image
            _check_size(size, config.patch_size, path)
            config.image_size = size
        model: PreTrainedModel = kind.from_pretrained(place, config=config) if pretrained else kind(config)
        images: Any = AutoImageProcessor.from_pretrained(place)
    if size not in (None, config.image_size):
        raise UserError(f"student.image_size: '{path}' has positions for {config.image_size} pixels, got {size}")
    return Tower(model, tuple(images.image_mean), tuple(images.image_std), int(images.resample))
