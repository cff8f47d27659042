"""The learning rate over the steps, in closed form.

mmengine's own schedulers multiply the last value by a factor, so that their value past the end, after a resume or
after a chain of two depends on what was called before. Here the value is a function of the step alone.
"""

from __future__ import annotations

import math

import torch
from mmengine.optim import BaseOptimWrapper, _ParamScheduler

from laavit.engine.settings import TrainSettings


def schedule_factor(step: int, steps: int, warmup: int, kind: str) -> float:
    """Learning rate of a step as a share of its peak.

    With t the step (0-based), w the warm-up and T all steps: ``t / w`` for t < w; then 1 ('constant'),
    ``(T - t) / (T - w)`` ('linear') or ``(1 + cos(pi (t - w) / (T - w))) / 2`` ('cosine'); 0 for t >= T in the latter
    two. These are Hugging Face's schedules, which the paper trained with: the very first step of a warm-up has rate 0.

    Args:
        step: 0-based optimizer step, may lie past the end.
        kind: 'linear', 'cosine' or 'constant'.
    """
    if step < warmup:
        return step / warmup
    if kind == "constant":
        return 1.0
    if step >= steps:
        return 0.0
    done = (step - warmup) / max(1, steps - warmup)
    return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


class ClosedFormLR(_ParamScheduler):
    """``lr = peak * schedule_factor(step)`` as an mmengine scheduler; its whole state is the step.

    Args:
        optimizer: whose groups' ``lr`` are set.
        settings: give the steps, the warm-up and the kind of schedule.
    """

    def __init__(self, optimizer: BaseOptimWrapper | torch.optim.Optimizer, settings: TrainSettings) -> None:
        self.settings = settings
        super().__init__(optimizer, param_name="lr", by_epoch=False)

    def _get_value(self) -> list[float]:
        s = self.settings
        factor = schedule_factor(self.last_step, s.steps, s.warmup_steps, s.schedule)
        return [base * factor for base in self.base_values]

    def state_dict(self) -> dict:
        """The step, nothing else: everything else follows from the settings."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go to the step of a checkpoint and set its learning rate."""
        self.last_step = self._global_step = int(state_dict["last_step"])
        for group, value in zip(self.optimizer.param_groups, self._get_value()):
            group["lr"] = value
        self._last_value = [group["lr"] for group in self.optimizer.param_groups]
