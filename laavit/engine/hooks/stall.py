"""A run that stands still ends by itself, and leaves what every process was doing."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from laavit.engine.distributed import rank_and_world

FOLDER = "stalled"
#: seconds that a process waits for the others' stacks before it ends
PATIENCE = 30.0
#: exit code of every mistake that is told in a sentence
EXIT = 2

logger = logging.getLogger("laavit.engine")


class Watchdog(threading.Thread):
    """Ends the process when nobody has said for ``limit`` seconds that it goes on.

    A process that waits in a collective cannot raise; its threads still run, since waiting lets go of the interpreter.

    Args:
        folder: ``RUN/stalled``, seen by all processes. limit: seconds.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        super().__init__(name="laavit-watchdog", daemon=True)
        self.folder, self.limit = folder, limit
        self.rank, self.world = rank_and_world()
        self.ended = threading.Event()
        self.beat("before the first step")

    def beat(self, doing: str) -> None:
        """Life goes on. doing: what comes now, for the one who reads the report."""
        self.doing, self.mark = doing, time.monotonic()

    def run(self) -> None:
        """Look every now and then."""
        while not self.ended.wait(min(10.0, self.limit / 10)):
            if time.monotonic() - self.mark > self.limit:
                self.end()

    def file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.txt"

    def end(self) -> None:
        """Write this process's stacks, wait for those of the others, say so in a sentence, and exit."""
        doing = self.doing
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.file(self.rank).open("w", encoding="utf-8") as file:
                file.write(f"process {self.rank}: {doing}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # a full disk must not keep the run from ending
            logger.error("the stack of process %d could not be written: %s", self.rank, error)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        until = time.monotonic() + PATIENCE
        while not all(map(self.told, range(self.world))) and time.monotonic() < until:
            time.sleep(0.05)
        if self.rank == min(rank for rank in range(self.world) if self.told(rank) or rank == self.rank):
            logger.critical("%s", self.sentence(doing))
        time.sleep(min(1.0, self.limit))  # who starts processes ends all when one does: let the sentence be said
        logging.shutdown()
        os._exit(EXIT)

    def told(self, rank: int) -> bool:
        """Whether a process has written its stacks."""
        return self.file(rank).is_file()

    def sentence(self, doing: str) -> str:
        """What stands still, and where more is to be read."""
        each = []
        for rank in range(self.world):
            first = self.file(rank).read_text(encoding="utf-8").partition("\n")[0] if self.told(rank) else ""
            own = f"process {rank}: {doing}" if rank == self.rank else f"process {rank}: no word of it"
            each.append(first or own)
        return (
            f"nothing has moved for {self.limit / 60:.3g} minutes (train.stall_minutes), so the run ends; "
            f"{'; '.join(each)}; the stacks of all threads are in '{self.folder}'; run again with --resume"
        )


class StallHook(Hook):
    """Starts a :class:`Watchdog` and tells it of every micro-batch and step.

    Args:
        minutes: without either, after which the run ends; 0: never.
    """

    priority = "LOWEST"  # what the others do after a step belongs to the step

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.watchdog: Watchdog | None = None

    def before_train(self, runner: Any) -> None:
        """Watch from now on; a former run's report is no longer true."""
        if not self.minutes:
            return
        self.watchdog = Watchdog(Path(runner.work_dir) / FOLDER, self.minutes * 60)
        self.watchdog.file(self.watchdog.rank).unlink(missing_ok=True)
        self.watchdog.beat(f"waiting for the data of step {runner.iter}")
        self.watchdog.start()

    def beat(self, doing: str) -> None:
        if self.watchdog is not None:
            self.watchdog.beat(doing)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """The data is there."""
        self.beat(f"in step {batch_idx}")

    def before_micro_batch(self, runner: Any, data_batch: Any) -> None:
        """A part of the step is done."""
        self.beat(f"in step {runner.iter}")

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """The step is made, logged and saved."""
        self.beat(f"waiting for the data of step {batch_idx + 1}")

    def close(self, runner: Any) -> None:
        """Watch no longer, however the run ends."""
        watchdog, self.watchdog = self.watchdog, None
        if watchdog is not None:
            watchdog.ended.set()
            watchdog.join(PATIENCE)
