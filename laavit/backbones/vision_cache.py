"""Image features of a frozen vision tower, worked out once and kept on disk.

The key is what they depend on: the weights before the decoder (tower, projector, separators) and how they are used
(the configuration: which layer is read), the run's precision, the processor's settings, the image's bytes, and whether
it is its sample's only one (LLaVA-OneVision cuts up no other).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from laavit.backbones.base import Backbone, digest_of
from laavit.backbones.feature_cache import CachedFeatures, takes_patches
from laavit.files import write_bytes
from laavit.registry import UserError
from laavit.structures import Encoded, Sample

logger = logging.getLogger(__name__)

#: what a configuration says that image features do not depend on: names, and what concerns the decoder's words
BESIDE = ("text_config", "_name_or_path", "transformers_version", "architectures", "vocab_size", "tie_word_embeddings")


def _seen_by(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration (``to_dict``) says of how images become features, the tower's own within it."""
    return {
        key: _seen_by(value) if isinstance(value, dict) else value
        for key, value in ((str(key), value) for key, value in config.items())
        if key not in BESIDE and not key.endswith(("token_id", "token_index"))
    }


def _whole(backbone: Backbone) -> tuple[nn.Module, str]:
    """Tower, projector and decoder, and how the names of the decoder's parameters begin in it."""
    whole: nn.Module = backbone.model.model  # type: ignore[assignment]
    decoder = backbone.family.decoder(backbone.model)
    return whole, next(f"{name}." for name, module in whole.named_modules() if module is decoder)


def check_frozen(backbone: Backbone) -> None:
    """Refuse a model of which something learns that image features depend on.

    Raises:
        UserError: naming the first parameter.
    """
    whole, inside = _whole(backbone)
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad and not name.startswith(inside):
            raise UserError(f"cached image features would be out of date after a step: {name} learns, freeze it")


def keep_features(backbone: Backbone, limit: int) -> None:
    """From now on, in training, let each image pass a frozen vision tower once (``train.cache_vision``).

    Args:
        limit: bytes of features that are kept in the main memory.

    Raises:
        UserError: the family's inputs have another form, or something that the features depend on learns.
    """
    family = backbone.family
    if not takes_patches(family):
        raise UserError(
            f"train.cache_vision tells images apart in inputs of Qwen-VL's form, and {type(family).__name__} has "
            "another: take traces.vision_cache"
        )
    check_frozen(backbone)
    backbone.feature_cache = CachedFeatures(family, backbone.model, limit)


class VisionCache:
    """Features by image, on disk (safetensors, one file an image, atomic) and, the first of them, in memory.

    Args:
        folder: where to keep them. backbone: whose vision tower makes them.
        memory: bytes of features held in memory while the object lives.
        precision: the run's: with 'bf16' they are made as a step of training makes them, and take half the disk.

    Raises:
        UserError: something that the features depend on is still to learn.
    """

    def __init__(self, folder: Path, backbone: Backbone, memory: int = 1 << 30, precision: str = "fp32") -> None:
        self.backbone, self.precision = backbone, precision
        check_frozen(backbone)
        whole, inside = _whole(backbone)
        before = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith(inside)}
        processor = backbone.processor
        config: Any = backbone.model.config
        read = [processor.image_processor.to_dict(), getattr(processor, "images_kwargs", {})]
        settings = json.dumps([*read, _seen_by(config.to_dict()), precision], sort_keys=True, default=str)
        self.namespace = hashlib.sha256((digest_of(before) + settings).encode()).hexdigest()[:32]
        self.folder = Path(folder) / self.namespace
        self.memory, self._held = memory, 0
        self._memory: dict[str, Tensor] = {}
        #: whether everything has been worked out (``laavit.data.cached_features``): then it only reads
        self.filled = False

    def _keys(self, sample: Sample) -> list[str]:
        several = "-several" if len(sample.images) > 1 else ""
        return [hashlib.sha256(Path(path).read_bytes()).hexdigest() + several for path in sample.images]

    def holds(self, sample: Sample) -> bool:
        """Whether the features of all images of a sample are on the disk."""
        return all(self._file(key).is_file() for key in self._keys(sample))

    @contextmanager
    def computing_on(self, device: torch.device) -> Iterator[None]:
        """While this is open, what makes features (tower, projector) is on a device; then where it was."""
        before = self._device
        self._move(device)
        try:
            yield
        finally:
            self._move(before)

    @property
    def _device(self) -> torch.device:
        return next(self.backbone.family.vision_tower(self.backbone.model).parameters()).device

    def _move(self, device: torch.device) -> None:
        family, model = self.backbone.family, self.backbone.model
        for part in (family.vision_tower(model), *family.projector(model)):
            if isinstance(part, nn.Module):
                part.to(device)
            else:
                part.data = part.data.to(device)

    @torch.no_grad()
    def features(self, encoded: Encoded) -> Tensor:
        """[N, D] of all images of a sample, in order; computed where they are not kept yet.

        Raises:
            UserError: they are not kept, and nothing is to be worked out any more.
        """
        keys = self._keys(encoded.sample)
        found = [self._read(key) for key in keys]
        kept = [features for features in found if features is not None]
        if len(kept) < len(keys) and self.filled:
            raise UserError(
                f"traces.vision_cache: '{self.folder}' lacks what was kept before the run began of an image of sample "
                f"'{encoded.sample.id}': the image or the folder was changed meanwhile; start or resume the run again"
            )
        if len(kept) < len(keys):
            vision = {name: tensor.to(self._device) for name, tensor in encoded.vision.items()}
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                made = self.backbone.family.image_features(self.backbone.model, vision)
            kept = [features.cpu() for features in made]
            for key, features in zip(keys, kept, strict=True):
                write_bytes(self._file(key), save({"features": features.contiguous()}), sync=False)
                self._remember(key, features)
        return torch.cat(kept)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> Tensor | None:
        features = self._memory.get(key)
        if features is None and (file := self._file(key)).is_file():
            try:
                features = load_file(file)["features"]
            except SafetensorError as error:  # written without a flush, which a machine that stops may cut short
                logger.warning("the image features in '%s' are broken (%s): they are worked out anew", file, error)
                return None
            self._remember(key, features)
        return features

    def _remember(self, key: str, features: Tensor) -> None:
        """Keep an image's features in memory, as long as there is room: the first ones stay, so that every epoch's
        pass over the data finds them again (of the last ones it would find none).

        A data worker keeps none: each would hold as much again, and the system keeps files that were read."""
        if get_worker_info() is None and key not in self._memory and self._held + features.nbytes <= self.memory:
            self._memory[key] = features
            self._held += features.nbytes
