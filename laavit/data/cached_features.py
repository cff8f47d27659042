"""Image features of whole data sets, worked out before a run begins, where loading data could not do it.

Features that are not kept yet (``traces.vision_cache``) are otherwise worked out where a sample is loaded. A data
worker cannot use its parent's GPU, and a process that holds a share of the tower's weights (fsdp2) none of them alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from laavit.backbones.chat import SequenceBuilder
from laavit.backbones.vision_cache import VisionCache
from laavit.data.aligned import image_keys_of
from laavit.structures import Encoded, Sample


class Missing(Dataset[Encoded | None]):
    """Samples as prompts, by place; None where the features of all their images are kept."""

    def __init__(self, samples: Sequence[Sample], builder: SequenceBuilder, cache: VisionCache) -> None:
        self.samples, self.builder, self.cache = samples, builder, cache

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Encoded | None:
        sample = self.samples[index]
        return None if self.cache.holds(sample) else self.builder.prompt_of(sample)


def fill(
    cache: VisionCache,
    sets: Sequence[Sequence[Sample]],
    builder: SequenceBuilder,
    device: torch.device,
    workers: int = 0,
    start: float = 0.0,
) -> None:
    """Work out the features of every image that are not kept yet; from then on the cache only reads.

    Processes need not speak with each other: each goes through all samples, beginning at a place of its own, and leaves
    out what others have written by then, so that it is complete on every machine.

    Args:
        sets: of samples. builder: makes their sequences. device: where the tower computes meanwhile.
        workers: processes that open and scale images. start: share of the samples after which to begin, in [0, 1).

    Raises:
        UserError: an image cannot be read.
    """
    if workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork, and it says so
    with cache.computing_on(device):
        for samples in sets:
            places: dict[object, int] = {}
            for place, key in enumerate(image_keys_of(samples)):
                places.setdefault(key, place)
            order, begin = list(places.values()), int(start * len(places))
            order = order[begin:] + order[:begin]
            loader = DataLoader(
                Missing(samples, builder, cache), batch_size=None, sampler=order, num_workers=workers,
                generator=torch.Generator(),  # its own: the generator that the model draws from must not move
            )  # fmt: skip
            console = Console(stderr=True)
            for prompt in track(loader, "image features", total=len(order), console=console, transient=True):
                if prompt is not None:
                    cache.features(prompt)
    cache.filled = True
