"""Image features of a frozen vision tower, worked out once and kept on disk.

The key is what they depend on: the weights before the decoder (tower, projector, separators), the processor's settings,
the image's bytes, and whether it is its sample's only one (LLaVA-OneVision cuts up no other).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from laavit.backbones.base import Backbone, digest_of
from laavit.files import write_bytes
from laavit.registry import UserError
from laavit.structures import Encoded


class VisionCache:
    """Features by image, on disk (safetensors, one file an image, atomic) and in memory while the object lives.

    Args:
        folder: where to keep them. backbone: whose vision tower makes them.

    Raises:
        UserError: something that the features depend on is still to learn.
    """

    def __init__(self, folder: Path, backbone: Backbone) -> None:
        self.backbone = backbone
        whole: nn.Module = backbone.model.model  # type: ignore[assignment]
        decoder = backbone.family.decoder(backbone.model)
        inside = next(f"{name}." for name, module in whole.named_modules() if module is decoder)
        learning = [n for n, p in whole.named_parameters() if p.requires_grad and not n.startswith(inside)]
        before = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith(inside)}
        if learning:
            raise UserError(f"cached image features would be out of date after a step: {learning[0]} learns, freeze it")
        processor = backbone.processor
        read = [processor.image_processor.to_dict(), getattr(processor, "images_kwargs", {})]
        settings = json.dumps(read, sort_keys=True, default=str)
        self.namespace = hashlib.sha256((digest_of(before) + settings).encode()).hexdigest()[:32]
        self.folder = Path(folder) / self.namespace
        self._memory: dict[str, Tensor] = {}

    def _key(self, path: Path) -> str:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    @torch.no_grad()
    def features(self, encoded: Encoded) -> Tensor:
        """[N, D] of all images of a sample, in order; computed where they are not kept yet."""
        several = "-several" if len(encoded.sample.images) > 1 else ""
        keys = [self._key(path) + several for path in encoded.sample.images]
        if any(key not in self._memory and not self._read(key) for key in keys):
            vision = {name: tensor.to(self.backbone.device) for name, tensor in encoded.vision.items()}
            for key, found in zip(keys, self.backbone.family.image_features(self.backbone.model, vision), strict=True):
                self._write(key, found.cpu())
        return torch.cat([self._memory[key] for key in keys])

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> bool:
        file = self._file(key)
        if file.is_file():
            self._memory[key] = load_file(file)["features"]
        return key in self._memory

    def _write(self, key: str, features: Tensor) -> None:
        write_bytes(self._file(key), save({"features": features.contiguous()}), sync=False)
        self._memory[key] = features
