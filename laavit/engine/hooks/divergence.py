"""Watches the logged losses: one that runs away from where it used to be is told, or stops the run."""

from __future__ import annotations

import json
import logging
import statistics
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from laavit.engine.distributed import any_process
from laavit.engine.hooks.log import FILE
from laavit.engine.settings import TrainingStopped

#: how often its running median a loss is far above it
FACTOR = 5.0
#: logged steps in a row that a loss is far above it before this is told
PATIENCE = 5
#: logged figures that the median is of, and how many it needs at least
WINDOW, LEAST = 50, 5

logger = logging.getLogger("laavit.engine")


class Watch:
    """One figure's running median, and for how many figures in a row it has been far above.

    Far above is more than ``FACTOR`` times the median, and above the first ``LEAST`` figures as well: a loss that has
    become small may be noisy. What is far above does not enter the median.
    """

    def __init__(self) -> None:
        self.values: deque[float] = deque(maxlen=WINDOW)
        self.begun: list[float] = []
        self.above = 0

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def see(self, value: float) -> bool:
        """Take the next figure; True when it is the ``PATIENCE``-th in a row that is far above."""
        if len(self.begun) < LEAST:
            self.begun.append(value)
        elif value > FACTOR * self.median and value > max(self.begun):
            self.above += 1
            return self.above == PATIENCE
        self.above = 0
        self.values.append(value)
        return False


class DivergenceHook(Hook):
    """Compares the answer's loss and every target's with its own running median, at logged steps.

    Reads what is logged anyway (means over all processes) and costs nothing; a resumed run reads the log back first.

    Args:
        action: 'warn', or 'stop'.
    """

    def __init__(self, action: str = "warn") -> None:
        self.action = action
        self.watches: dict[str, Watch] = defaultdict(Watch)

    def before_train(self, runner: Any) -> None:
        """Which figures are losses, and what they were before a resume."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.names = {"ntp", "emit", *getattr(model, "named_targets", {})}
        log = Path(runner.work_dir) / FILE
        for line in log.read_text(encoding="utf-8").splitlines() if runner.iter and log.is_file() else ():
            self.see(json.loads(line))

    def see(self, record: dict[str, Any]) -> list[str]:
        """The figures that have just been found far above their median for too long."""
        given = {name: record[name] for name in self.names if record.get(name) is not None}
        return [name for name, value in sorted(given.items()) if self.watches[name].see(value)]

    def after_log(self, runner: Any, record: dict[str, Any]) -> None:
        """Tell, or stop.

        Raises:
            TrainingStopped: in all processes, where the action is 'stop'.
        """
        far = self.see(record)
        told = "; ".join(
            f"{name} is {record[name]:.4g} and was {self.watches[name].median:.4g} (median), for {PATIENCE} logged "
            "steps in a row"
            for name in far
        )
        if self.action == "stop" and any_process(bool(far), runner.optim_wrapper.device):
            raise TrainingStopped(
                f"step {record['iter']}: training diverges: {told or 'as another process tells'}; lower train.lr or "
                "the target's weight, and go on from an earlier checkpoint (train.on_divergence='warn' only warns)"
            )
        if far:
            logger.warning("step %d: training diverges: %s", record["iter"], told)
