"""Says, once, that steps wait for data, and what cures it."""

from __future__ import annotations

import logging
import time
from typing import Any

from mmengine.hooks import Hook

from laavit.engine.distributed import rank_and_world
from laavit.engine.loader import cores_and_processes
from laavit.engine.settings import TrainSettings

logger = logging.getLogger("laavit.engine.own")  # told by each process

#: share of a window's time above which waiting is worth a word, and the steps of a window
SHARE, WINDOW = 0.05, 50


def cure(settings: TrainSettings, dataset: Any, epochs: float) -> str:
    """What is left to be tried for shorter waiting.

    What spares the vision tower alone (``train.cache_vision``) is none: images are opened and scaled all the same.

    Args:
        dataset: of the run. epochs: how often it goes through it.
    """
    cores, processes = cores_and_processes()
    each, now = max(1, cores // processes), settings.workers
    if now < each:
        found = [f"more workers (train.workers, now {now}; here are {each} cores for each process that trains)"]
    else:
        found = [f"more cores (train.workers is {now}, and here are {each} for each process that trains)"]
    family = getattr(getattr(dataset, "builder", None), "family", None)
    if family is not None and family.takes_features and epochs > 1 and not dataset.keeps:
        cached = "" if dataset.cache is not None else "traces.vision_cache (for a frozen tower) and "
        found.append(f"{cached}traces.keep, which open an image in the first epoch alone")
    return "; ".join([*found, "smaller images (student.max_pixels)"])


class DataWaitHook(Hook):
    """Compares the time a process waited for data with all time, over windows of steps; warns once.

    The first step, in which workers start, is left out.

    Args:
        settings: of the run. dataset, epochs: as ``cure`` takes them. window: steps that are looked at together.
    """

    def __init__(self, settings: TrainSettings, dataset: Any = None, epochs: float = 1, window: int = WINDOW) -> None:
        self.settings, self.dataset, self.epochs, self.window = settings, dataset, epochs, window
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
            told = cure(self.settings, self.dataset, self.epochs)
            logger.warning("%s for data %.0f %% of the last %d steps: %s", who, 100 * share, self.steps, told)
            self.said = True
        self.steps, self.waited, self.since = 0, 0.0, now
