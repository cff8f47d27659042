"""Out of memory, told in a sentence: what was asked for, and which lever of the recipe frees how much."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
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
#: and what remains of a data worker that the system has ended for it
WORKER = "killed by signal"

logger = logging.getLogger("laavit.engine")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is used up, on a GPU or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in (*PHRASES, WORKER))


@contextmanager
def told_out_of_memory(runner: Any, settings: TrainSettings) -> Iterator[None]:
    """Turn what a step raises for want of memory into a ``TrainingStopped``; checkpoints are as they were."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())
        if WORKER in said:
            freeing = "lower train.workers or train.prefetch, which each keep batches in main memory"
        else:
            freeing = cures(Path(runner.work_dir) / "recipe.json", settings)
        before = latest_checkpoint(runner.work_dir)
        raise TrainingStopped(
            f"step {runner.iter}: out of memory ({said.partition('. ')[0] or type(error).__name__}); {freeing}; "
            f"last checkpoint: {before or 'none yet'}"
        ) from error


def cures(recipe_file: Path, settings: TrainSettings) -> str:
    """Which levers are left and, where the recipe can be planned, what each frees; the strongest first."""
    world = rank_and_world()[1]
    try:
        plan = planned(recipe_file, world)
    except (*MISTAKES, MemoryError) as error:  # it must not hide why the run ended
        logger.info("what each lever frees could not be worked out: %s", error)
        return "what is left to do: " + "; ".join(levers({}, settings, world))
    found = levers(plan, settings, world)
    known = sorted(((size, lever) for lever, size in found.items() if size), reverse=True)
    words = [f"{lever} frees about {size / 2**30:.2g} GiB" for size, lever in known]
    words += [lever for lever, size in found.items() if size is None]
    return "on each GPU " + "; ".join(words)


def planned(recipe_file: Path, world: int) -> Mapping[str, Any]:
    """The plan of the run's recipe; its one use here, so that this is the one place to follow it.

    Raises:
        UserError: the recipe cannot be planned (another family, a model without a known configuration).
    """
    from laavit.engine.plan import Load, make_plan
    from laavit.recipe import load_recipe

    if not recipe_file.is_file():
        raise UserError(f"'{recipe_file}' is not there")
    return make_plan(load_recipe(recipe_file), Load(gpus=world))


def levers(plan: Mapping[str, Any], settings: TrainSettings, world: int) -> dict[str, int | None]:
    """What can still be switched on -> the bytes that it frees on one device; None where that is not known.

    Args:
        plan: what ``make_plan`` gives, or {}. world: processes.
    """
    training = plan.get("training", {})
    plain, saving = training.get("plain", {}), training.get("checkpointed", {})
    now = saving if settings.gradient_checkpointing else plain
    known = bool(now)
    moved = now.get("gradients", 0) + now.get("optimizer", 0) + now.get("buckets", 0)
    vision = plan.get("parameters", {}).get("vision", {}).get("trainable", 0)
    found: dict[str, int | None] = {}
    if not settings.gradient_checkpointing:
        found["train.gradient_checkpointing=True"] = plain["peak"] - saving["peak"] if known else None
    share = settings.batch_size // world
    if settings.accumulate < share and share % (2 * settings.accumulate) == 0:
        doubled = f"train.accumulate={2 * settings.accumulate} (half the samples at once)"
        found[doubled] = now["activations"] // 2 if known else None
    if not settings.shared_prefix and settings.grouped:
        found["train.shared_prefix=True (an image is read once for all of its questions)"] = None
    if world > 1:
        whole = now.get("weights", 0) + moved
        found[f"strategy=fsdp2 ({world} processes share weights and optimizer)"] = (
            whole - whole // world if known else None
        )
    found["strategy.offload=cpu of fsdp2 (weights and optimizer in main memory)"] = (
        now.get("weights", 0) + now.get("optimizer", 0) if known else None
    )
    if vision or not known:
        # a gradient and two moments in float32; activations of the tower come on top
        found["student.freeze=('vision',)"] = 12 * vision if known else None
    found["student.max_pixels lower (fewer image tokens)"] = None
    return found
