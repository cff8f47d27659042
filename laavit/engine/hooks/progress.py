"""What a person sees: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
from typing import Any

from mmengine.hooks import Hook
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from laavit.engine.distributed import rank_and_world

logger = logging.getLogger("laavit.engine")

#: figures of a record that are not worth a place on the screen
HIDDEN = {"iter", "epoch", "seconds", "step_seconds", "data_seconds", "data_share", "memory_gb", "host_memory_gb"}
HIDDEN_PARTS = ("grad_norm/", "target_grad/")


def show(record: dict[str, Any]) -> str:
    """``loss 1.234  ntp 1.1  lr 5e-06``, in the record's order."""
    shown = {k: v for k, v in record.items() if k not in HIDDEN and not k.startswith(HIDDEN_PARTS)}
    return "  ".join(f"{k} {v:.4g}" if v is not None else f"{k} -" for k, v in shown.items())


def span(seconds: float) -> str:
    """``1:02:03`` or ``02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class ProgressHook(Hook):
    """A rich bar where standard error is a terminal, else one line of the logger ``laavit.engine`` a logged step.

    Args:
        steps: of the whole run.
        console: where to draw; standard error where not given.
    """

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.steps = steps
        self.console = console or Console(stderr=True)
        self.bar: Progress | None = None

    def before_train(self, runner: Any) -> None:
        """Start the bar at the resumed step."""
        if rank_and_world()[0] or not self.console.is_terminal:
            return
        columns = (
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self.bar = Progress(*columns, console=self.console, refresh_per_second=2)
        self.task = self.bar.add_task("training", total=self.steps, completed=runner.iter, figures="")
        self.bar.start()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.advance(self.task)

    def after_log(self, runner: Any, record: dict[str, Any]) -> None:
        """Show the figures."""
        if self.bar is not None:
            self.bar.update(self.task, figures=show(record))
        elif rank_and_world()[0] == 0:
            left = span(record["step_seconds"] * (self.steps - record["iter"]))
            logger.info("step %d/%d  left %s  %s", record["iter"], self.steps, left, show(record))

    def close(self, runner: Any) -> None:
        """Leave the terminal as it was."""
        bar, self.bar = self.bar, None
        if bar is not None:
            bar.stop()
