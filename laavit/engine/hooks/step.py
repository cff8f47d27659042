"""Tells the model which step it is, for the gate's schedule."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper


class StepHook(Hook):
    """Calls ``model.set_step(t)`` before optimizer step t (0-based), once for all its micro-batches."""

    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """t is the number of steps done."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model.set_step(batch_idx)
