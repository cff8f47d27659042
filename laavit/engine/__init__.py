"""mmengine glue: everything between a model with a loss and a folder of checkpoints.

``train`` is imported when it is first asked for, so that reading a recipe (which needs :class:`TrainSettings`) stays
quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from laavit.engine.settings import TrainingStopped, TrainSettings

if TYPE_CHECKING:
    from laavit.engine.checkpoint import latest_checkpoint
    from laavit.engine.runner import train
    from laavit.engine.sampler import BatchSampler

__all__ = ["BatchSampler", "TrainSettings", "TrainingStopped", "latest_checkpoint", "train"]

_LAZY = {"train": "runner", "latest_checkpoint": "checkpoint", "BatchSampler": "sampler"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'laavit.engine' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"laavit.engine.{_LAZY[name]}"), name)
