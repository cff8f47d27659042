"""A teacher that is any Hugging Face vision-language model; frozen and pinned to eval here, and nowhere else."""

from __future__ import annotations

from torch import cuda

from laavit.backbones.base import Backbone
from laavit.registry import TEACHERS


@TEACHERS.register_module()
class HFTeacher:
    """A frozen Hugging Face vision-language model.

    Args:
        path: folder, hub name or ``zoo:NAME``.
        dtype: of the weights.
        device: 'auto' takes a GPU where there is one.
    """

    def __init__(self, path: str, dtype: str = "float32", device: str = "auto") -> None:
        self.path = path
        self.backbone = Backbone.load(path, dtype, ("cuda" if cuda.is_available() else "cpu") if device == "auto" else device)
        self.backbone.model.eval().requires_grad_(False)
