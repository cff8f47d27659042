"""Where a run goes on: which checkpoint, whether it fits the run, and how everything but the weights is put back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from laavit.engine import random_state
from laavit.engine.checkpoint import latest_checkpoint, read_progress, read_state
from laavit.engine.distributed import any_process
from laavit.engine.optim import NamedParameters, load_optimizer_tensors
from laavit.engine.sampler import BatchSampler
from laavit.engine.settings import TrainSettings
from laavit.files import remove_leftovers
from laavit.registry import UserError

logger = logging.getLogger("laavit.engine")

#: settings that the order of the data depends on: a resumed run must have the same
FIXED = ("seed", "batch_size", "grouped")
#: settings that may change between start and resume without changing the result
FREE = (
    *("workers", "prefetch", "cache_vision", "checkpoint_every", "keep_last", "log_every", "tensorboard", "device"),
    "find_unused_parameters",
)


def starting_point(work_dir: Path, resume: bool, rank: int, device: torch.device) -> Path | None:
    """The checkpoint to go on from, the same in every process; leftovers of a killed run are cleared."""
    if rank == 0:
        try:
            (work_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            remove_leftovers(work_dir)
            remove_leftovers(work_dir / "checkpoints")
        except OSError as error:
            raise UserError(f"the run folder '{work_dir}' cannot be written: {error}") from None
    any_process(False, device)  # nobody looks before process 0 has cleaned up
    found = latest_checkpoint(work_dir)
    if found is not None and not resume:
        raise UserError(
            f"'{work_dir}' already holds a run up to '{found.name}': add --resume, or choose another folder"
        )
    if found is None and resume and rank == 0:
        logger.info("nothing to resume in %s: starting at step 0", work_dir)
    return found


def check_resumable(checkpoint: Path, settings: TrainSettings, sampler: BatchSampler) -> int:
    """Compare a checkpoint with the run that wants to go on from it; returns the steps done."""
    state = read_state(checkpoint)
    before, now = state["settings"], settings.as_dict()
    for name in FIXED:
        if before[name] != now[name]:
            raise UserError(
                f"train.{name}: got {now[name]}, but the run in '{checkpoint.parent.parent}' has {before[name]}"
            )
    if state["data"]["fingerprint"] != sampler.fingerprint:
        raise UserError(
            f"the data set differs from the one that '{checkpoint.parent.parent}' was trained on "
            f"({state['data']['length']} samples then): resume with the same data and filters"
        )
    if int(state["iter"]) > settings.steps:
        raise UserError(
            f"train.steps: got {settings.steps}, and the run in '{checkpoint.parent.parent}' has done {state['iter']}"
        )
    changed = [f"{k} {before.get(k)} -> {now[k]}" for k in now if k not in FREE and before.get(k) != now[k]]
    if changed:
        logger.warning("resuming with other settings, so not to the same bits: %s", ", ".join(changed))
    return int(state["iter"])


def restorer(checkpoint: Path, named: NamedParameters, device: torch.device) -> Callable[[Any], None]:
    """Puts optimizer, schedule and generators where the checkpoint has them (the weights are loaded before)."""

    def restore(runner: Any) -> None:
        progress = read_progress(checkpoint)
        load_optimizer_tensors(runner.optim_wrapper.optimizer, named, progress.optimizer)
        runner.param_schedulers[0].load_state_dict(progress.state["scheduler"])
        if not random_state.restore(progress.random, device):
            logger.warning("resuming with another number of processes, so not to the same bits")
        logger.info("resumed at step %d from %s", progress.step, checkpoint)

    return restore
