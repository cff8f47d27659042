"""The hooks of a training run, one a file; each does one thing at one of mmengine's points.

Beside mmengine's points there are three of ours: ``before_micro_batch(runner, data_batch)``, ``after_log(runner,
record)`` with the plain figures of a logged step, and ``close(runner)``, called however the run ends.
"""

from laavit.engine.hooks.checkpoint import CheckpointHook
from laavit.engine.hooks.data_wait import DataWaitHook
from laavit.engine.hooks.guard import GuardHook
from laavit.engine.hooks.log import LogHook
from laavit.engine.hooks.progress import ProgressHook
from laavit.engine.hooks.step import StepHook
from laavit.engine.hooks.tensorboard import TensorBoardHook

__all__ = ["CheckpointHook", "DataWaitHook", "GuardHook", "LogHook", "ProgressHook", "StepHook", "TensorBoardHook"]
