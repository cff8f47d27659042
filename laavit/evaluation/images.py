"""Each image is prepared once, however many questions are asked about it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import BatchFeature


class CachedImages:
    """Stands in for a processor's image processor and remembers what it made of each image.

    Only outputs of the Qwen-VL form are kept (``pixel_values`` [patches, width] of all images in a row, with
    ``image_grid_thw`` [images, 3]), because only there an image's share does not depend on its neighbours. Anything
    else goes through to the wrapped processor, unchanged and uncached.

    Args:
        inner: the image processor; every other attribute is read from it.
        limit: bytes of pixel values kept; the least recently used go first.
    """

    def __init__(self, inner: Any, limit: int) -> None:
        self.inner = inner
        self.limit = limit
        self.hits = 0
        self.misses = 0
        self._size = 0
        self._another_form = False
        self._kept: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        # by id, the image beside its digest, so that no other image gets its id
        self._digests: dict[int, tuple[Image, str]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, images: Any, **settings: Any) -> BatchFeature:
        """The wrapped processor's output for ``images``: PIL images, or lists of them, for a cache to apply."""
        flat = _flat(images)
        if self._another_form or not (flat and all(isinstance(image, Image) for image in flat)):
            return self.inner(images, **settings)
        keys = [self._key(image, settings) for image in flat]
        fresh = {key: image for key, image in zip(keys, flat) if key not in self._kept}
        made: dict[str, tuple[Tensor, Tensor]] = {}
        if fresh:
            output = self.inner(list(fresh.values()), **settings)
            if set(output) != {"pixel_values", "image_grid_thw"} or not isinstance(output["pixel_values"], Tensor):
                self._another_form = True
                return self.inner(images, **settings)  # which may depend on which images belong together
            grids = output["image_grid_thw"]
            shares = output["pixel_values"].split(grids.prod(-1).tolist())
            made = {key: (share.clone(), grid) for key, share, grid in zip(fresh, shares, grids)}
        self.misses += len(made)
        self.hits += len(flat) - len(made)
        parts = [made[key] if key in made else self._use(key) for key in keys]
        for key, part in made.items():
            self._keep(key, part)
        pixels, grids = zip(*parts)
        return BatchFeature({"pixel_values": torch.cat(pixels), "image_grid_thw": torch.stack(grids)})

    @contextmanager
    def unchanging(self) -> Iterator[None]:
        """While this is open no image changes its pixels, so that each is hashed once."""
        outer = self._digests
        if outer is None:
            self._digests = {}
        try:
            yield
        finally:
            self._digests = outer

    def digest(self, image: Image) -> str:
        """What an image's pixels are known by."""
        if self._digests is not None and id(image) in self._digests:
            return self._digests[id(image)][1]
        digest = hashlib.blake2b(image.tobytes(), digest_size=16)
        palette = (image.getpalette(), image.info.get("transparency")) if image.palette else None  # pixels are numbers
        digest.update(repr((image.mode, image.size, palette)).encode())
        if self._digests is not None:
            self._digests[id(image)] = image, digest.hexdigest()
        return digest.hexdigest()

    def _key(self, image: Image, settings: dict[str, Any]) -> str:
        return self.digest(image) + repr(sorted(settings.items()))

    def clear(self) -> None:
        """Let all prepared images go."""
        self._kept.clear()
        self._size = 0

    def _use(self, key: str) -> tuple[Tensor, Tensor]:
        self._kept.move_to_end(key)
        return self._kept[key]

    def _keep(self, key: str, part: tuple[Tensor, Tensor]) -> None:
        self._kept[key] = part
        self._size += part[0].nbytes
        while self._size > self.limit and self._kept:
            self._size -= self._kept.popitem(last=False)[1][0].nbytes


def _flat(images: Any) -> list[Any]:
    """The images of a list, or of a list of lists; [] for anything else."""
    if not isinstance(images, list):
        return []
    return [image for one in images for image in (one if isinstance(one, list) else [one])]


def images_of(chats: Sequence[Sequence[dict[str, Any]]]) -> list[list[Any]]:
    """The images of Hugging Face chat messages, a list a chat, [] where none has any.

    A list a chat, since some processors count a chat's images (SmolVLM, Gemma 3), and LLaVA-OneVision cuts a chat's
    only image up otherwise than one of several.
    """
    found = [
        [
            part["image"]
            for message in chat
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image"
        ]
        for chat in chats
    ]
    return found if any(found) else []
