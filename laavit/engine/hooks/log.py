"""``log.jsonl``: one JSON object for each logged step."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from laavit.engine.distributed import mean_over_processes, rank_and_world
from laavit.engine.settings import TrainingStopped, TrainSettings
from laavit.engine.throughput import Work, memory_figures, peak_flops
from laavit.files import write_text

FILE = "log.jsonl"


def truncate_log(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step``, and a last line cut off by a kill, atomically."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["iter"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))


class LogHook(Hook):
    """Turns tensors into numbers every ``log_every`` steps (one host sync), writes them, and tells other hooks.

    A record holds ``iter`` (steps done), the model's figures of that step (means over micro-batches and processes),
    ``lr``, ``grad_norm`` (before clipping), ``epoch`` (passes over the data), ``seconds`` (since this process began
    to train), ``step_seconds`` and ``data_seconds`` (means over the steps since the last record), ``data_share`` (of
    the latter in the former), of all processes together ``samples_per_second``, ``tokens_per_second`` (positions read,
    padding left out) and, where the GPU's peak is known, ``mfu``; ``host_memory_gb``, and on a GPU ``memory_gb``
    (peaks of process 0); and what other hooks have put beside the model's figures (tensors, in ``after_train_iter``)
    or into the record (numbers, in ``before_log``). Afterwards it is ``runner.figures``, in all processes.

    Args:
        settings: how often, and how many steps.
        epochs_a_step: passes over the data that one step makes.
    """

    priority = "BELOW_NORMAL"  # before the schedule moves on: the rate is the one that was used

    def __init__(self, settings: TrainSettings, epochs_a_step: float) -> None:
        self.settings, self.epochs_a_step = settings, epochs_a_step

    def before_train(self, runner: Any) -> None:
        """Open for appending (the log has been cut to the resumed step), and start the clock."""
        self.file = None
        if rank_and_world()[0] == 0:
            path = Path(runner.work_dir) / FILE
            self.file = path.open("a", encoding="utf-8")
        runner.figures = {}
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.work = Work(model, peak_flops(runner.optim_wrapper.device, self.settings.precision))
        self.start = self.mark = time.perf_counter()
        self.waited, self.steps = 0.0, 0

    def before_micro_batch(self, runner: Any, data_batch: Any) -> None:
        """Count what is read."""
        self.work.add(data_batch)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Count; on a logged step, write."""
        self.waited += runner.train_loop.data_seconds
        self.steps += 1
        done = batch_idx + 1
        if not self.settings.logs(done):
            return
        figures, totals = self._figures(runner, outputs or {})
        now = time.perf_counter()
        record = {
            "iter": done,
            **figures,
            "epoch": round(done * self.epochs_a_step, 6),
            "seconds": round(now - self.start, 3),
            "step_seconds": round((now - self.mark) / self.steps, 5),
            "data_seconds": round(self.waited / self.steps, 5),
            "data_share": round(self.waited / max(now - self.mark, 1e-9), 5),
            **self.work.rates(totals, now - self.mark, rank_and_world()[1]),
            **memory_figures(runner.optim_wrapper.device),
        }
        runner.call_hook("before_log", record=record)
        # What others look at before a line is written is no part of the steps' time.
        self.mark, self.waited, self.steps = time.perf_counter(), 0.0, 0
        self.work.reset()
        if self.file is not None:
            self._write(record)
        runner.figures = record
        runner.call_hook("after_log", record=record)

    def _figures(self, runner: Any, outputs: dict[str, Any]) -> tuple[dict[str, float | None], list[float]]:
        """The model's figures and those of other hooks, and the counts of what all processes have read."""
        wrapper, world = runner.optim_wrapper, rank_and_world()[1]
        named = {**outputs, "grad_norm": wrapper.grad_norm}
        values = [torch.as_tensor(v, dtype=torch.float64, device=wrapper.device).reshape(()) for v in named.values()]
        counts = torch.tensor(self.work.counts(), dtype=torch.float64).to(wrapper.device, non_blocking=True)
        numbers = mean_over_processes(torch.cat([torch.stack(values), counts])).tolist()
        # JSON knows no NaN; a figure may be undefined (a mean over no sample) without the loss being so.
        figures = {name: number if math.isfinite(number) else None for name, number in zip(named, numbers)}
        totals = [mean * world for mean in numbers[len(named) :]]
        return {**figures, "lr": wrapper.optimizer.param_groups[0]["lr"]}, totals

    def _write(self, record: dict[str, Any]) -> None:
        assert self.file is not None, "only process 0 writes"
        try:
            self.file.write(json.dumps(record, allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise TrainingStopped(
                f"step {record['iter']}: {FILE} could not be written ({error}); make room, then run again with --resume"
            ) from error

    def close(self, runner: Any) -> None:
        """Close the file."""
        file, self.file = getattr(self, "file", None), None
        if file is not None:
            file.close()
