"""The training loop: one iteration is one optimizer step, however many micro-batches it takes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop
from torch import Tensor

from laavit.engine.checkpoint import latest_checkpoint
from laavit.engine.normalisation import add_shares
from laavit.engine.settings import TrainingStopped
from laavit.registry import UserError, sentence


def sample_ids(data: Any) -> list[str]:
    """The ids of the samples in a batch: of the ``samples`` it (or a part of it) carries, or none."""
    parts: Iterable[Any] = [data]
    if isinstance(data, dict):
        parts = [data, *data.values()]
    elif isinstance(data, (list, tuple)):
        parts = data
    for part in parts:
        samples = part.get("samples") if isinstance(part, dict) else getattr(part, "samples", None)
        if samples is not None:
            return [str(getattr(sample, "id", sample)) for sample in samples]
    return []


@LOOPS.register_module()
class StepLoop(IterBasedTrainLoop):
    """mmengine's iteration loop, starting anywhere without replaying data, with whole steps as iterations.

    Schedules, hooks and checkpoints therefore count in optimizer steps, and no checkpoint falls between micro-batches.
    Hooks may define ``before_micro_batch(runner, data_batch)`` beside mmengine's points.

    Args:
        runner: mmengine's Runner.
        dataloader: yields ``accumulate`` micro-batches a step, beginning with those of step ``start``.
        max_iters: optimizer steps of the whole run.
        accumulate: micro-batches a step.
        start: steps that are done already.
    """

    def __init__(self, runner: Any, dataloader: Any, max_iters: int, accumulate: int = 1, start: int = 0) -> None:
        super().__init__(runner, dataloader, max_iters)
        self.accumulate = accumulate
        self._iter = start
        #: seconds that the last step waited for data
        self.data_seconds = 0.0

    def run(self) -> torch.nn.Module:
        """Train from the present step to the last."""
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        try:
            while self._iter < self._max_iters and not self.stop_training:
                self.run_iter(self._micro_batches())
        finally:
            # Workers end now. Left to the garbage collector, whose order is arbitrary, each may be waited for 5 s.
            del self.dataloader_iterator
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def _micro_batches(self) -> list[Any]:
        """The next step's micro-batches, all of them: the losses of each depend on what the others hold.

        Raises:
            TrainingStopped: a sample cannot be loaded.
        """
        before = time.perf_counter()
        try:
            batches = [next(self.dataloader_iterator) for _ in range(self.accumulate)]
        except UserError as error:
            raise TrainingStopped(
                f"step {self._iter}: {sentence(error)}; once that is mended --resume goes on; last checkpoint: "
                f"{latest_checkpoint(self.runner.work_dir) or 'none yet'}"
            ) from error
        self.data_seconds = time.perf_counter() - before
        model = self.runner.model.module if is_model_wrapper(self.runner.model) else self.runner.model
        add_shares(model, batches, self.runner.optim_wrapper.device)
        return batches

    def run_iter(self, micro_batches: Sequence[Any]) -> None:
        """One optimizer step.

        Args:
            micro_batches: the ``accumulate`` batches of the step; their figures' mean is that of the whole step.
        """
        self.runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=None)
        totals: dict[str, Tensor | float] = {}
        data = None
        for data in micro_batches:
            self.runner.call_hook("before_micro_batch", data_batch=data)
            outputs = self.runner.model.train_step(data, optim_wrapper=self.runner.optim_wrapper)
            for name, value in outputs.items():
                # Detached: a figure kept for the log must not keep the graph of its step alive.
                value = (value.detach() if isinstance(value, Tensor) else value) / self.accumulate
                totals[name] = totals[name] + value if name in totals else value
        self.runner.call_hook("after_train_iter", batch_idx=self._iter, data_batch=data, outputs=totals)
        self._iter += 1
