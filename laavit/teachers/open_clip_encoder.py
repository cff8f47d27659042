"""Visual towers of open_clip as static teachers: its own transformers, and those that it takes from timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from laavit.backbones.encoders import open_clip_model
from laavit.registry import TEACHERS, UserError
from laavit.teachers.pictures import PicturePreparer
from laavit.teachers.static import StaticEncoder, Tower, check_weights
from laavit.teachers.timm_encoder import TimmTower


class OpenCLIPTower(Tower):
    """open_clip's own vision transformer: the CLS token first, the patches after it.

    Raises:
        UserError: the tower ends in CoCa's attentional pooler, whose norm is not of the patches.
    """

    def __init__(self, model: Any) -> None:
        if model.attn_pool is not None:
            raise UserError("open_clip towers with an attentional pooler (CoCa) cannot be teachers")
        attentions = [block.attn for block in model.transformer.resblocks]
        patch = model.patch_size
        super().__init__(model, attentions, None, (int(patch[0]), int(patch[1])), int(model.conv1.out_channels))

    def states(self, pixels: Tensor, layer: int) -> Tensor:
        model: Any = self.model
        last = layer == len(self.attentions) - 1
        found = model.forward_intermediates(
            pixels, indices=[layer], normalize_intermediates=last, intermediates_only=True, output_fmt="NLC"
        )
        return found["image_intermediates"][0]


def tower_of(visual: Any) -> Tower:
    """The tower of a CLIP model's ``visual``.

    Raises:
        UserError: it is no vision transformer.
    """
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, TimmModel):
        return TimmTower(visual.trunk)
    if isinstance(visual, VisionTransformer):
        return OpenCLIPTower(visual)
    raise UserError(f"open_clip's {type(visual).__name__} is no vision transformer and cannot be a teacher")


@TEACHERS.register_module()
class OpenCLIPEncoder(StaticEncoder):
    """The frozen visual tower of a CLIP model of open_clip.

    Args:
        path: open_clip's name of it ('ViT-B-16').
        weights: a local .safetensors file of the whole model. pretrained: the name of the weights to read from the hub
            instead ('laion2b_s34b_b88k').
        size: pixels of a side, a multiple of the patch; None is the model's own. Every image is squashed to a square
            of that size: the towers' positions are of one grid, and the whole image is seen.
        options: further parts of open_clip's model configuration (``vision_cfg``, ...).
        dtype: of the weights. device: 'auto' takes a GPU where there is one.
    """

    def __init__(
        self,
        path: str,
        weights: str | None = None,
        pretrained: str | None = None,
        size: int | None = None,
        options: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        device: str = "auto",
    ) -> None:
        import open_clip  # it imports timm, which takes two seconds that no other teacher should wait for

        built: Any = open_clip_model(path, check_weights(weights, pretrained), pretrained, size, options)
        config = open_clip.get_model_preprocess_cfg(built)
        tower = tower_of(built.visual)  # the text tower is let go with ``built``
        side = config["size"]
        height, width = (side, side) if isinstance(side, int) else side
        preparer = PicturePreparer(
            height, width, tower.patch, "squash", tuple(config["mean"]), tuple(config["std"]), config["interpolation"]
        )
        super().__init__(path, "open_clip", tower, preparer, dtype, device)
