"""Writes checkpoints every so many steps and after the last."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from torch import Tensor

from laavit.engine import random_state
from laavit.engine.checkpoint import Progress
from laavit.engine.disk import check_space
from laavit.engine.distributed import rank_and_world
from laavit.engine.optim import NamedParameters
from laavit.engine.optimizer_state import optimizer_state, whole
from laavit.engine.saving import Copies, Saver, Snapshot
from laavit.engine.settings import TrainSettings, best_rule
from laavit.engine.sharded import MODEL, OPTIMIZER
from laavit.engine.strategies import Strategy
from laavit.registry import nearest

logger = logging.getLogger("laavit.engine")


class CheckpointHook(Hook):
    """The only writer of ``checkpoints/``: takes a snapshot of the run between two steps, and has it written.

    Args:
        settings: how often, in which format, how many to keep; they go into ``state.json`` as well.
        named: trainable parameters by name, for the optimizer's state.
        strategy: how the model is spread over the processes.
        about: plain data for ``state.json``: the recipe, and under ``data`` what fixes the order of the data (see
            :class:`laavit.engine.sampler.BatchSampler`).
    """

    priority = "VERY_LOW"  # after the schedule has moved on: the state is that of the next step

    def __init__(
        self, settings: TrainSettings, named: NamedParameters, strategy: Strategy, about: Mapping[str, Any]
    ) -> None:
        self.settings, self.named, self.strategy, self.about = settings, named, strategy, about
        self.saver: Saver | None = None
        self.told = False

    def before_train(self, runner: Any) -> None:
        """Is there room for what this run will write?"""
        device = runner.optim_wrapper.device
        self.model = self.strategy.unwrapped(runner.model)
        check_space(Path(runner.work_dir), self.model, self.named, self.settings, runner.iter, device)
        self.saver = Saver(Path(runner.work_dir), self.model, self.settings)
        self.copies = Copies(device) if self.settings.checkpoint_async else None

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Write after every ``checkpoint_every``-th and the last step."""
        done, every = batch_idx + 1, self.settings.checkpoint_every
        if done == self.settings.steps or (every and done % every == 0):
            self.write(runner, done)

    def write(self, runner: Any, done: int) -> None:
        """Write the checkpoint of ``done`` steps; the last one is there when this returns.

        Raises:
            TrainingStopped: in every process, when this one or the one before could not be written.
        """
        assert self.saver is not None, "the hook's before_train comes first"
        self.saver.wait()
        self.saver.save(self.snapshot(runner, done))
        if done == self.settings.steps:
            self.saver.wait()

    def snapshot(self, runner: Any, done: int) -> Snapshot:
        """The run as it is now; with ``checkpoint_async`` of copies, so that the next step may begin."""
        rank, world = rank_and_world()
        device = runner.optim_wrapper.device
        state = {
            **self.about,
            "scheduler": runner.param_schedulers[0].state_dict(),
            "data": {**self.about["data"], "step": done},
            "world_size": world,
            "settings": self.settings.as_dict(),
            "figures": self._figures(runner),
            "skipped": getattr(runner, "skipped", 0),
        }
        random = random_state.capture(device)
        optimizer = optimizer_state(runner.optim_wrapper.optimizer, self.named)
        if self.settings.checkpoint_format == "sharded" and done != self.settings.steps:
            shards = {f"{MODEL}{name}": tensor for name, tensor in self._learned().items()}
            shards |= {f"{OPTIMIZER}{name}": tensor for name, tensor in optimizer.items()}
            return Snapshot(Progress(done, {}, random, state), shards=self._copied(shards))
        progress = Progress(done, self._copied(whole(optimizer, keep=rank == 0)), random, state)
        weights: dict[str, Tensor] | None = self.strategy.full_state(self.model)
        if self.copies is not None and rank == 0:
            weights = weights or self.model.state_dict()
            weights |= self._copied({name: weights[name] for name in self._changing() & weights.keys()})
        return Snapshot(progress, weights)

    def close(self, runner: Any) -> None:
        """The process does not end before what it began to write is written."""
        saver, self.saver = self.saver, None
        if saver is not None:
            saver.close()

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if self.copies is None else self.copies.of(tensors)

    def _changing(self) -> set[str]:
        """Names of what training changes of the model, tied ones under each of their names; no other is copied."""
        parameters = self.model.named_parameters(remove_duplicate=False)
        buffers = self.model.named_buffers(remove_duplicate=False)
        return {name for name, parameter in parameters if parameter.requires_grad} | {name for name, _ in buffers}

    def _learned(self) -> dict[str, Tensor]:
        """What training changes of the model, tied parameters once; buffers, if they are kept at all, among it."""
        names = {name for name, _ in self.named} | {name for name, _ in self.model.named_buffers()}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name in names}

    def _figures(self, runner: Any) -> dict[str, float]:
        """The figure by which the best checkpoint is told, where there is one."""
        if self.settings.keep_best is None:
            return {}
        name, _ = best_rule(self.settings.keep_best)
        logged = getattr(runner, "figures", {})
        if logged.get(name) is None:
            if not self.told:
                found = nearest(name, list(logged))
                logger.warning("train.keep_best: no '%s' in the last logged figures; %s", name, found)
            self.told = True
            return {}
        return {name: float(logged[name])}
