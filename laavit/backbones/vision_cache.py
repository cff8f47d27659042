"""Image features of a frozen vision tower, worked out once and kept on disk.

The key is what they depend on: the tower's weights, the processor's settings and the image's bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from laavit.backbones.base import Backbone, digest_of
from laavit.files import write_bytes
from laavit.structures import Encoded


class VisionCache:
    """Features by image, on disk (safetensors, one file an image, atomic) and in memory while the object lives.

    Args:
        folder: where to keep them. backbone: whose vision tower makes them.
    """

    def __init__(self, folder: Path, backbone: Backbone) -> None:
        self.backbone = backbone
        tower = digest_of(backbone.family.vision_tower(backbone.model))
        settings = json.dumps(backbone.processor.image_processor.to_dict(), sort_keys=True, default=str)
        self.namespace = hashlib.sha256((tower + settings).encode()).hexdigest()[:32]
        self.folder = Path(folder) / self.namespace
        self._memory: dict[str, Tensor] = {}

    def _key(self, path: Path) -> str:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    @torch.no_grad()
    def features(self, encoded: Encoded) -> Tensor:
        """[N, D] of all images of a sample, in order; computed where they are not kept yet."""
        keys = [self._key(path) for path in encoded.sample.images]
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
