"""Out of memory, told in a sentence: what was asked for, and which lever of the recipe frees how much."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from laavit.engine.checkpoint import latest_checkpoint
from laavit.engine.distributed import rank_and_world
from laavit.engine.settings import TrainingStopped, TrainSettings
from laavit.registry import MISTAKES, UserError

#: how PyTorch says it where it raises a plain RuntimeError: on the CPU, and inside cuBLAS
PHRASES = ("DefaultCPUAllocator", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
#: how it begins to say that a data worker has ended, as one does that the system ends for want of memory
WORKER = "DataLoader worker (pid"

logger = logging.getLogger("laavit.engine")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is used up, on a GPU or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)


def worker_end(error: BaseException) -> str | None:
    """How a data worker has ended, where an exception says that one has.

    torch says how in the middle of something else, or behind another exception where it was waiting for the worker.
    """
    said = [str(each) for each in (error.__cause__, error) if str(each).startswith(WORKER)]
    return " ".join(said[0].partition(". ")[0].split()) if said else None


@contextmanager
def told_out_of_memory(runner: Any, settings: TrainSettings) -> Iterator[None]:
    """Turn what a step raises for want of memory, or because a data worker has ended, into a ``TrainingStopped``.

    Checkpoints are as they were.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        ended = worker_end(error)
        if ended is not None:
            told = (
                f"{ended}; where the system ended it for want of memory, lower train.workers or train.prefetch, which "
                "each keep batches in main memory; train.workers=0 shows any other cause"
            )
        elif is_out_of_memory(error):
            said = " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
            told = f"out of memory ({said}); {cures(Path(runner.work_dir) / 'recipe.json', settings)}"
        else:
            raise
        before = latest_checkpoint(runner.work_dir)
        raise TrainingStopped(f"step {runner.iter}: {told}; last checkpoint: {before or 'none yet'}") from error


def cures(recipe_file: Path, settings: TrainSettings) -> str:
    """Which levers are left and, where the recipe can be planned, what each frees; the strongest first."""
    world = rank_and_world()[1]
    try:
        found = freed(recipe_file, world)
    except (*MISTAKES, MemoryError) as error:  # it must not hide why the run ended
        logger.info("what each lever frees could not be worked out: %s", error)
        return "what is left to do: " + "; ".join(levers(settings, world))
    return "on each GPU " + "; ".join(
        [*(f"{lever} frees about {size / 2**30:.2g} GiB" for lever, size in found), "student.max_pixels lower"]
    )


def freed(recipe_file: Path, world: int) -> list[tuple[str, int]]:
    """What the plan of the run's recipe says of each lever, and the bytes that it frees.

    Raises:
        UserError: the recipe cannot be planned (a model without a known configuration).
    """
    from laavit.engine.examples import Load
    from laavit.engine.plan import make_plan
    from laavit.engine.planning import levers as planned
    from laavit.recipe import load_recipe

    if not recipe_file.is_file():
        raise UserError(f"'{recipe_file}' is not there")
    return planned.levers(make_plan(load_recipe(recipe_file), Load(gpus=world)))


def levers(settings: TrainSettings, world: int) -> list[str]:
    """What can still be switched on, where nothing is known of the model. world: processes."""
    found = []
    if not settings.gradient_checkpointing:
        found.append("train.gradient_checkpointing=True")
    share = settings.batch_size // world
    if settings.accumulate < share and share % (2 * settings.accumulate) == 0:
        found.append(f"train.accumulate={2 * settings.accumulate} (half the samples at once)")
    if not settings.shared_prefix and settings.grouped:
        found.append("train.shared_prefix=True (an image is read once for all of its questions)")
    if world > 1:
        found.append("strategy=fsdp2 (processes share weights and optimizer)")
    found.append("strategy=fsdp2 with strategy.offload=cpu (they wait in main memory)")
    return [*found, "student.freeze=[vision]", "student.max_pixels lower (fewer image tokens)"]
