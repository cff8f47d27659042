"""Stops a run whose loss or gradient is no longer finite, before the weights are spoilt."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor

from laavit.engine.checkpoint import latest_checkpoint
from laavit.engine.distributed import any_process
from laavit.engine.loop import sample_ids
from laavit.engine.settings import TrainingStopped

SHOWN = 8


class GuardHook(Hook):
    """Checks the loss and the gradient's norm between backward pass and step; costs one host sync a step."""

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self.ids: list[str] = []

    def before_train(self, runner: Any) -> None:
        """Stand before the optimizer."""
        self.runner = runner
        runner.optim_wrapper.guard = self.check

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """A new step, no samples yet."""
        self.ids = []

    def before_micro_batch(self, runner: Any, data_batch: Any) -> None:
        """Remember who is in the step."""
        self.ids += sample_ids(data_batch)

    def check(self, loss: Tensor, norm: Tensor) -> None:
        """Compare both with infinity.

        Raises:
            TrainingStopped: in every process, when either is not finite in any.
        """
        bad = not torch.isfinite(loss + norm.to(loss)).item()
        if not any_process(bad, loss.device):
            return
        value = loss.item()
        what = (
            f"the loss is {value}"
            if not torch.isfinite(loss)
            else f"the gradient's norm is {norm.item()} (loss {value:.6g})"
        )
        if not bad:
            what = "the loss or the gradient is not finite in another process"
        before = latest_checkpoint(self.runner.work_dir)
        more = f" and {len(self.ids) - SHOWN} more" if len(self.ids) > SHOWN else ""
        raise TrainingStopped(
            f"step {self.runner.iter}: {what}; stopped before the weights changed; "
            f"samples: {', '.join(self.ids[:SHOWN]) or 'unknown'}{more}; "
            f"last checkpoint: {before or 'none yet'}; look at these samples, or lower train.lr"
        )

    def close(self, runner: Any) -> None:
        """Let go of the runner."""
        runner.optim_wrapper.guard = None
