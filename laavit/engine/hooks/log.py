"""``log.jsonl``: one JSON object for each logged step."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from laavit.engine.distributed import mean_over_processes, rank_and_world
from laavit.engine.settings import TrainingStopped, TrainSettings
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
    to train), ``step_seconds`` and ``data_seconds`` (means over the steps since the last record), ``data_share`` (the
    latter over the former), and on a GPU ``memory_gb`` (peak).

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
        self.start = self.mark = time.perf_counter()
        self.waited, self.steps = 0.0, 0

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Count; on a logged step, write."""
        self.waited += runner.train_loop.data_seconds
        self.steps += 1
        done = batch_idx + 1
        if done not in (1, self.settings.steps) and done % self.settings.log_every:
            return
        record = {"iter": done, **self._figures(runner, outputs or {})}
        now = time.perf_counter()
        record |= {
            "epoch": round(done * self.epochs_a_step, 6),
            "seconds": round(now - self.start, 3),
            "step_seconds": round((now - self.mark) / self.steps, 5),
            "data_seconds": round(self.waited / self.steps, 5),
            "data_share": round(self.waited / max(now - self.mark, 1e-9), 5),
        }
        if runner.optim_wrapper.device.type == "cuda":
            record["memory_gb"] = round(torch.cuda.max_memory_allocated(runner.optim_wrapper.device) / 2**30, 3)
        self.mark, self.waited, self.steps = now, 0.0, 0
        if self.file is not None:
            self._write(record)
        runner.call_hook("after_log", record=record)

    @staticmethod
    def _figures(runner: Any, outputs: dict[str, Any]) -> dict[str, float | None]:
        wrapper = runner.optim_wrapper
        named = {**outputs, "grad_norm": wrapper.grad_norm}
        values = [torch.as_tensor(v, dtype=torch.float64, device=wrapper.device).reshape(()) for v in named.values()]
        numbers = mean_over_processes(torch.stack(values)).tolist()
        # JSON knows no NaN; a figure may be undefined (a mean over no sample) without the loss being so.
        figures = {name: number if math.isfinite(number) else None for name, number in zip(named, numbers)}
        return {**figures, "lr": wrapper.optimizer.param_groups[0]["lr"]}

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
