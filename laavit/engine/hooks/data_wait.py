"""Says, once, that steps wait for data, and what cures it."""

from __future__ import annotations

import logging
import time
from typing import Any

from mmengine.hooks import Hook

from laavit.engine.distributed import rank_and_world
from laavit.engine.settings import TrainSettings

logger = logging.getLogger("laavit.engine")

#: share of a window's time above which waiting is worth a word, and the steps of a window
SHARE, WINDOW = 0.05, 50


class DataWaitHook(Hook):
    """Compares the time a process waited for data with all time, over windows of steps; warns once.

    The first step, in which workers start, is left out.

    Args:
        settings: of the run; they tell which cure is left. window: steps that are looked at together.
    """

    def __init__(self, settings: TrainSettings, window: int = WINDOW) -> None:
        self.settings, self.window = settings, window
        self.steps, self.waited, self.since, self.said = -1, 0.0, 0.0, False

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Add up; at the end of a window, compare."""
        if self.said:
            return
        self.steps += 1
        self.waited += runner.train_loop.data_seconds
        if self.steps and self.steps < self.window:
            return
        now = time.perf_counter()
        share = self.waited / (now - self.since)
        if self.steps and share > SHARE:
            rank, world = rank_and_world()
            who = f"process {rank} waited" if world > 1 else "training waited"
            logger.warning("%s for data %.0f %% of the last %d steps: %s", who, 100 * share, self.steps, self.cure)
            self.said = True
        self.steps, self.waited, self.since = 0, 0.0, now

    @property
    def cure(self) -> str:
        """What the settings leave to be tried."""
        cures = [f"more workers (train.workers, now {self.settings.workers})"]
        if not self.settings.cache_vision:
            cures.append("keep what a frozen vision tower makes of an image (train.cache_vision, traces.vision_cache)")
        return "; ".join([*cures, "smaller images (student.max_pixels)"])
