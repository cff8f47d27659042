"""How batches reach the training process: decoded and processed in workers, ready before they are asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from laavit.engine.settings import TrainSettings
from laavit.registry import UserError

logger = logging.getLogger("laavit.engine")


def cores_and_processes() -> tuple[int, int]:
    """The cores that this process may use, and the processes of the run that this machine runs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores, int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def build_loader(
    dataset: Any, sampler: Any, collate: Callable[[list], Any], settings: TrainSettings, device: torch.device
) -> DataLoader:
    """The loader of a run: one pass over the sampler's batches, from the first step to the last.

    Workers open, scale and encode images and put batches together; each keeps ``settings.prefetch`` of them ready. They
    live as long as the pass, which is the run. On a GPU batches lie in pinned memory, from which they are copied while
    the GPU computes (``Batch.to`` does not wait). With torchrun every process has workers of its own.

    Args:
        sampler: yields lists of indices, those of this process. collate: samples -> the model's arguments.
        device: where the model is.

    Raises:
        UserError: a data set would run a model that is on the GPU in its workers.
    """
    on_gpu = device.type == "cuda"
    if settings.workers:
        cache = getattr(dataset, "cache", None)
        if on_gpu and cache is not None and not cache.filled:  # a forked process cannot use its parent's GPU
            raise UserError(
                "traces.vision_cache runs the vision tower where data is loaded, and workers cannot use the GPU: fill "
                "it before the run (laavit.data.cached_features), or set train.workers=0"
            )
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork, and it says so
        cores, processes = cores_and_processes()
        if settings.workers * processes > cores:
            logger.warning(
                "train.workers: %d for each of %d processes here, on %d cores; fewer may be faster",
                settings.workers, processes, cores,
            )  # fmt: skip
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=settings.workers,
        prefetch_factor=settings.prefetch if settings.workers else None,
        pin_memory=on_gpu,
        # Its own generator: starting workers must not move the generator that the model draws from.
        generator=torch.Generator().manual_seed(settings.seed),
    )
