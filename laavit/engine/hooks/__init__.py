"""The hooks of a training run, one a file; each does one thing at one of mmengine's points.

Beside mmengine's points there are five of ours: ``before_micro_batch(runner, data_batch)``; ``before_update(runner)``,
between a backward pass and the step, where gradients are whole, finite and not yet clipped; ``before_log(runner,
record)``, where plain figures may be put beside those of a logged step, and ``after_log(runner, record)``, where they
are read; ``close(runner)``, called however the run ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from laavit.engine.hooks.checkpoint import CheckpointHook
from laavit.engine.hooks.data_wait import DataWaitHook
from laavit.engine.hooks.divergence import DivergenceHook
from laavit.engine.hooks.gradient_norms import GradientNormHook
from laavit.engine.hooks.guard import GuardHook
from laavit.engine.hooks.log import LogHook
from laavit.engine.hooks.progress import ProgressHook
from laavit.engine.hooks.stall import StallHook
from laavit.engine.hooks.step import StepHook
from laavit.engine.hooks.target_gradients import TargetGradientHook
from laavit.engine.hooks.tensorboard import TensorBoardHook
from laavit.engine.hooks.wandb import WandbHook

if TYPE_CHECKING:
    from mmengine.hooks import Hook

    from laavit.engine.settings import TrainSettings

__all__ = ["CheckpointHook", "DataWaitHook", "LogHook", "ProgressHook", "StepHook", "guards", "writers"]


def guards(settings: TrainSettings) -> list[Hook]:
    """What watches over a run: its steps, its losses, its targets, its pace."""
    return [
        GuardHook(settings.skip_nonfinite),
        TargetGradientHook(settings),
        GradientNormHook(settings),
        DivergenceHook(settings.on_divergence),
        # A full disk is waited for, and by all processes: that is no stall.
        StallHook(settings.stall_minutes and settings.stall_minutes + settings.disk_retry_s / 60),
    ]


def writers(settings: TrainSettings) -> list[Hook]:
    """Who is told the logged figures beside ``log.jsonl``."""
    found: list[Hook] = [TensorBoardHook()] if settings.tensorboard else []
    return [*found, *([WandbHook(settings.wandb)] if settings.wandb is not None else [])]
