"""Is there room for a run's checkpoints? Asked before the first step."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from laavit.engine.distributed import any_process, rank_and_world
from laavit.engine.optim import NamedParameters
from laavit.engine.settings import TrainSettings
from laavit.registry import UserError

logger = logging.getLogger("laavit.engine")


def checkpoint_bytes(model: Any, named: NamedParameters, kind: str) -> int:
    """About what one checkpoint takes: weights, and AdamW's two moments of those that learn.

    Args:
        model: ``saved_bytes()`` are those of the weights in a consolidated checkpoint.
        kind: 'consolidated' or 'sharded'.
    """
    learned = sum(parameter.numel() * parameter.element_size() for _, parameter in named)
    return 2 * learned + (learned if kind == "sharded" else int(model.saved_bytes()))


def most_at_once(settings: TrainSettings, start: int) -> int:
    """How many checkpoints a run that goes on from step ``start`` adds to the disk before it deletes one."""
    left = settings.steps - start
    written = math.ceil(left / settings.checkpoint_every) if settings.checkpoint_every else min(left, 1)
    # The new one is there before the oldest goes.
    return min(written, settings.keep_last + 1 + (settings.keep_best is not None)) if settings.keep_last else written


def gigabytes(size: int) -> str:
    """``1.23 GB``."""
    return f"{size / 1e9:.3g} GB"


def check_space(
    work_dir: Path, model: Any, named: NamedParameters, settings: TrainSettings, start: int, device: torch.device
) -> None:
    """Compare the checkpoints of a run with the free space; all processes together.

    Raises:
        UserError: not even one fits. A warning says that one of the later ones may not.
    """
    size, last = (checkpoint_bytes(model, named, kind) for kind in (settings.checkpoint_format, "consolidated"))
    count = most_at_once(settings, start)
    free = shutil.disk_usage(work_dir).free
    there = sum(file.stat().st_size for file in (work_dir / "checkpoints").rglob("*") if file.is_file())
    both = "" if size == last else f" (the last one {gigabytes(last)})"
    what = f"a checkpoint takes about {gigabytes(size)}{both}, and '{work_dir}' has {gigabytes(free)} free"
    if any_process(count > 0 and size > free, device):
        raise UserError(f"{what}: make room, or choose another folder")
    if rank_and_world()[0] == 0 and count > 0 and (count - 1) * size + last - there > free:
        logger.warning("%s, while up to %d are there at once: make room, or lower train.keep_last", what, count)
