"""Each image passes a vision tower that does not learn once, however many questions are asked about it.

Features are kept in memory for as long as a process evaluates or trains; ``vision_cache`` keeps them on disk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laavit.backbones.families.base import Family
from laavit.structures import Sample

#: the processor's outputs of the Qwen-VL form: rows of patches, whose number an image the grid tells
PATCHES, GRID = "pixel_values", "image_grid_thw"


class CachedFeatures:
    """What the language model reads in place of image tokens, kept by image.

    Only for inputs of the Qwen-VL form (Qwen2-VL, Qwen2.5-VL, Qwen3-VL), where an image's patches can be told from
    its neighbours'; other inputs go through as they are.

    Args:
        family: how features are made and handed over. model: whose tower makes them.
        limit: bytes of features kept, in the main memory; the least recently used go first. 0 keeps none.
    """

    def __init__(self, family: Family, model: Any, limit: int) -> None:
        self.family, self.model, self.limit = family, model, limit
        self.hits = 0
        self.misses = 0
        self._size = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def in_place_of_pixels(self, inputs: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
        """Arguments of the model with features [N_i, D] an image in place of its pixels.

        Args:
            inputs: the processor's output for a batch (or what of it concerns images), on the model's device.
            keys: what each of its images is known by, in order; equal images have equal keys.
        """
        if not (self.limit and self.family.takes_features and keys and {PATCHES, GRID} <= set(inputs)):
            return dict(inputs)
        device = inputs[PATCHES].device
        fresh = list(dict.fromkeys(key for key in keys if key not in self._kept))
        made: dict[str, Tensor] = {}
        if fresh:
            grids = inputs[GRID]
            patches = inputs[PATCHES].split(grids.prod(-1).tolist())
            chosen = [keys.index(key) for key in fresh]
            vision = {PATCHES: _joined([patches[i] for i in chosen], inputs[PATCHES]), GRID: grids[chosen]}
            with torch.no_grad():
                made = dict(zip(fresh, self.family.image_features(self.model, vision), strict=True))
        self.misses += len(made)
        self.hits += len(keys) - len(made)
        features = [made[key] if key in made else self._use(key).to(device) for key in keys]
        for key, one in made.items():
            self._keep(key, one)
        vision = {name: inputs[name] for name in self.family.vision_keys if name in inputs}
        text = {name: value for name, value in inputs.items() if name not in vision}
        return text | self.family.inputs(vision, features)

    def clear(self) -> None:
        """Let all features go."""
        self._kept.clear()
        self._size = 0

    def _use(self, key: str) -> Tensor:
        self._kept.move_to_end(key)
        return self._kept[key]

    def _keep(self, key: str, features: Tensor) -> None:
        # a copy of its own: the tower's output holds the whole batch in one piece of memory
        self._kept[key] = features.detach().to("cpu", copy=True)
        self._size += features.nbytes
        while self._size > self.limit and self._kept:
            self._size -= self._kept.popitem(last=False)[1].nbytes


def takes_patches(family: Family) -> bool:
    """Whether a family's inputs have the form in which images can be told apart, and features can stand for them."""
    return family.takes_features and {PATCHES, GRID} <= set(family.vision_keys)


def image_keys(samples: Sequence[Sample]) -> list[str]:
    """What the images of samples are known by while a process trains: their files, in order."""
    return [str(path) for sample in samples for path in sample.images]


def _joined(parts: Sequence[Tensor], whole: Tensor) -> Tensor:
    """The parts in a row; ``whole`` itself where they are all of it, which spares a copy of its pixels."""
    return whole if sum(map(len, parts)) == len(whole) else torch.cat(list(parts))
