"""Writes checkpoints every so many steps and after the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from laavit.engine import random_state
from laavit.engine.checkpoint import Progress, write_checkpoint
from laavit.engine.distributed import any_process, rank_and_world
from laavit.engine.optim import NamedParameters, optimizer_tensors
from laavit.engine.settings import TrainingStopped, TrainSettings


class CheckpointHook(Hook):
    """The only writer of ``checkpoints/``; process 0 writes, all wait.

    Args:
        settings: how often, how many to keep; they go into ``state.json`` as well.
        named: trainable parameters by name, for the optimizer's state.
        data: what fixes the order of the data (see :class:`laavit.engine.sampler.BatchSampler`).
    """

    priority = "VERY_LOW"  # after the schedule has moved on: the state is that of the next step

    def __init__(self, settings: TrainSettings, named: NamedParameters, data: dict[str, Any]) -> None:
        self.settings, self.named, self.data = settings, named, data
        self.last: Path | None = None

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Write after every ``checkpoint_every``-th and the last step."""
        done, every = batch_idx + 1, self.settings.checkpoint_every
        if done == self.settings.steps or (every and done % every == 0):
            self.write(runner, done)

    def write(self, runner: Any, done: int) -> None:
        """Write the checkpoint of ``done`` steps.

        Raises:
            TrainingStopped: in every process, when process 0 could not write.
        """
        rank, world = rank_and_world()
        device = runner.optim_wrapper.device
        random = random_state.capture(device)
        failure: TrainingStopped | None = None
        if rank == 0:
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            state = {
                "scheduler": runner.param_schedulers[0].state_dict(),
                "data": {**self.data, "step": done},
                "world_size": world,
                "settings": self.settings.as_dict(),
            }
            optimizer = optimizer_tensors(runner.optim_wrapper.optimizer, self.named)
            try:
                self.last = write_checkpoint(
                    Path(runner.work_dir), model, Progress(done, optimizer, random, state), self.settings.keep_last
                )
            except TrainingStopped as error:
                failure = error
        if any_process(failure is not None, device):
            raise failure or TrainingStopped(f"the checkpoint of step {done} could not be written by process 0")
