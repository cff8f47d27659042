"""A step whose loss or gradient is not finite is not made: it is kept on disk, and skipped or the run's end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from safetensors import SafetensorError
from torch import Tensor

from laavit.engine.bad_batch import BadBatch, step_folder, write_bad_batch
from laavit.engine.checkpoint import latest_checkpoint
from laavit.engine.distributed import any_process, rank_and_world
from laavit.engine.loop import sample_ids
from laavit.engine.settings import TrainingStopped

SHOWN = 8

#: what a process knows of itself: told by each, while all else is told by process 0 alone
logger = logging.getLogger("laavit.engine.own")


class GuardHook(Hook):
    """Checks the loss and the gradient's norm between backward pass and step; costs one host sync a step.

    A skipped step counts as a step: schedule, data and generators move on, weights and the optimizer's state do not,
    and a resumed run skips the same ones. All processes decide together.

    Args:
        allowed: how many steps of the run may be skipped; the next one stops it.
    """

    priority = "VERY_HIGH"

    def __init__(self, allowed: int = 0) -> None:
        self.allowed, self.skipped = allowed, 0
        self.ids: list[str] = []
        self.batches: list[Any] = []

    def before_train(self, runner: Any) -> None:
        """Stand before the optimizer."""
        self.runner = runner
        self.skipped = runner.skipped = getattr(runner, "skipped", 0)  # of the checkpoint that it goes on from
        runner.optim_wrapper.guard = self.check

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """A new step: no samples yet, and the generators as its forward will find them."""
        self.ids, self.batches = [], []
        self.random = {"torch": torch.get_rng_state()}
        if runner.optim_wrapper.device.type == "cuda":
            self.random["cuda"] = torch.cuda.get_rng_state(runner.optim_wrapper.device)

    def before_micro_batch(self, runner: Any, data_batch: Any) -> None:
        """Remember who is in the step."""
        self.ids += sample_ids(data_batch)
        self.batches.append(data_batch)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """The number of skipped steps is a figure of the log, where skipping is allowed."""
        self.batches = []
        if self.allowed and outputs is not None:
            outputs["skipped"] = float(self.skipped)

    def check(self, loss: Tensor, norm: Tensor) -> bool:
        """Compare both with infinity; returns whether the step is to be made.

        Raises:
            TrainingStopped: in every process, when either is not finite in any and no more steps may be skipped.
        """
        bad = not torch.isfinite(loss + norm.to(loss)).item()
        if not any_process(bad, loss.device):
            self.runner.call_hook("before_update")
            return True
        value = loss.item()
        lost = not torch.isfinite(loss).item()
        what = f"the loss is {value}" if lost else f"the gradient's norm is {norm.item()} (loss {value:.6g})"
        if not bad:
            what = "the loss or the gradient is not finite in another process"
        elsewhere = any_process(lost, loss.device) and not lost  # the gradient is everybody's, its cause is not
        kept = None if elsewhere else self._keep(what)
        more = f" and {len(self.ids) - SHOWN} more" if len(self.ids) > SHOWN else ""
        told = f"samples: {', '.join(self.ids[:SHOWN]) or 'unknown'}{more}; " + (f"batch: {kept}; " if kept else "")
        self.skipped = self.runner.skipped = self.skipped + 1
        if self.skipped <= self.allowed:
            logger.warning(
                "step %d: %s; skipped, %d of %d; %s", self.runner.iter, what, self.skipped, self.allowed, told[:-2]
            )
            return False
        before = latest_checkpoint(self.runner.work_dir)
        raise TrainingStopped(
            f"step {self.runner.iter}: {what}; stopped before the weights changed; {told}"
            f"last checkpoint: {before or 'none yet'}; look at these samples, or lower train.lr"
        )

    def _keep(self, what: str) -> Path | None:
        """Write this process's share of the step; a disk that refuses must not hide what went wrong."""
        folder, rank = step_folder(Path(self.runner.work_dir), self.runner.iter), rank_and_world()[0]
        facts = {"step": self.runner.iter, "what": what, "samples": self.ids}
        try:
            write_bad_batch(folder, rank, BadBatch(facts, self.batches, self.random))
        except (OSError, SafetensorError) as error:
            logger.warning("step %d: its batch could not be kept: %s", self.runner.iter, error)
            return None
        return folder

    def close(self, runner: Any) -> None:
        """Let go of the runner."""
        runner.optim_wrapper.guard = None
