"""Vision transformers of timm as static teachers: DINOv2 (with and without registers), DINOv3, SigLIP, plain ViT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from laavit.backbones.encoders import timm_model
from laavit.registry import TEACHERS, UserError
from laavit.teachers.pictures import PicturePreparer
from laavit.teachers.static import StaticEncoder, Tower, check_weights


class TimmTower(Tower):
    """A timm vision transformer (VisionTransformer, Eva): blocks with one ``attn`` each, CLS token first or a pool.

    Raises:
        UserError: the model is no such transformer, or has neither a CLS token nor an attention pool of one query.
    """

    def __init__(self, model: nn.Module) -> None:
        blocks: Any = getattr(model, "blocks", ())
        attentions = [block.attn for block in blocks if hasattr(block, "attn")]
        whole = len(attentions) == len(blocks) > 0 and hasattr(model, "num_prefix_tokens")
        if not whole or not hasattr(model, "forward_intermediates"):
            raise UserError(f"{type(model).__name__} is no plain vision transformer of timm and cannot be a teacher")
        pool: Any = None
        if getattr(model, "cls_token", None) is None:
            pool = getattr(model, "attn_pool", None)
            if getattr(pool, "latent_len", None) != 1:
                raise UserError(
                    f"{type(model).__name__} without a CLS token and without an attention pool of one query looks "
                    "nowhere in particular: a gaze cannot be read off it"
                )
        shape: Any = model
        patch = shape.patch_embed.patch_size
        super().__init__(model, attentions, pool, (int(patch[0]), int(patch[1])), int(shape.embed_dim))

    def states(self, pixels: Tensor, layer: int) -> Tensor:
        model: Any = self.model
        last = layer == len(self.attentions) - 1
        final, (states,) = model.forward_intermediates(pixels, indices=[layer], norm=last, output_fmt="NLC")
        if self.pool is not None:
            model.forward_head(final, pre_logits=True)
        return states


@TEACHERS.register_module()
class TimmEncoder(StaticEncoder):
    """A frozen vision transformer of timm.

    Args:
        path: timm's name of it, with the tag of its weights ('vit_base_patch14_dinov2.lvd142m').
        weights: a local .safetensors file. pretrained: read the named weights from the hub instead.
        size: pixels of a side, a multiple of the patch; None is the model's own.
        aspect: 'squash' every image to a square of that size, or 'keep' its proportions at no more patches; the whole
            image is seen either way.
        options: further arguments of ``timm.create_model``.
        dtype: of the weights. device: 'auto' takes a GPU where there is one.
    """

    def __init__(
        self,
        path: str,
        weights: str | None = None,
        pretrained: bool = False,
        size: int | None = None,
        aspect: str = "squash",
        options: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        device: str = "auto",
    ) -> None:
        from timm.data import resolve_data_config  # takes two seconds, which no other teacher should wait for

        local = check_weights(weights, pretrained)
        built = timm_model(path, local, pretrained, {"dynamic_img_size": True, **(options or {})})
        tower = TimmTower(built)
        config = resolve_data_config({}, model=built)
        height, width = (size, size) if size is not None else config["input_size"][1:]
        preparer = PicturePreparer(
            height, width, tower.patch, aspect, tuple(config["mean"]), tuple(config["std"]), config["interpolation"]
        )
        super().__init__(path, "timm", tower, preparer, dtype, device)
