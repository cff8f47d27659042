"""Cells on this machine: worker processes, each on its own cores, each running many cells."""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from laavit.sweeps.plan import FILE, Cell, Plan
from laavit.sweeps.status import Status

logger = logging.getLogger(__name__)

#: what a worker runs: a plan and cores are its arguments
PROGRAM = (sys.executable, "-m", "laavit.sweeps.worker")
#: how often a cell is tried whose worker dies
ATTEMPTS = 2
#: seconds between looks at the clock
PULSE = 1.0


def cores() -> list[int]:
    """The cores this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def default_workers() -> int:
    """One a GPU; without one, one a core."""
    return torch.cuda.device_count() or len(cores())


def shares(workers: int, threads: int | None) -> list[list[int]]:
    """The cores of each worker: equal shares, or ``threads`` of them; more workers than cores take turns."""
    every = cores()
    size = threads or max(1, len(every) // workers)
    return [[every[(i * size + j) % len(every)] for j in range(size)] for i in range(workers)]


class Worker:
    """One worker process and the cell that it runs."""

    def __init__(self, number: int, plan: Plan, own: Sequence[int], messages: queue.Queue[tuple[int, Any]]) -> None:
        self.number = number
        self.cell: Cell | None = None
        environment = os.environ | {"OMP_NUM_THREADS": str(len(own)), "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
        if torch.cuda.device_count():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            listed = [gpu for gpu in visible if gpu] or [str(i) for i in range(torch.cuda.device_count())]
            environment["CUDA_VISIBLE_DEVICES"] = listed[number % len(listed)]
        words = [*PROGRAM, str(plan.out / FILE), ",".join(map(str, own))]
        self.process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the one who leads the sweep
        )
        threading.Thread(target=self._listen, args=(messages,), daemon=True).start()

    def _listen(self, messages: queue.Queue[tuple[int, Any]]) -> None:
        assert self.process.stdout is not None, "a pipe was asked for"
        for line in self.process.stdout:
            try:
                messages.put((self.number, json.loads(line)))
            except json.JSONDecodeError:  # what a library prints while it is imported, or a line that a kill cut off
                logger.debug("worker %d says: %s", self.number, line.rstrip())
        messages.put((self.number, None))

    def give(self, cell: Cell) -> None:
        """Let it run a cell. A process that has died is noticed by the end of its output."""
        assert self.process.stdin is not None, "a pipe was asked for"
        self.cell = cell
        try:
            self.process.stdin.write(cell.name + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            logger.debug("worker %d is gone", self.number)

    def end(self) -> None:
        """Stop it, whatever it does."""
        self.process.kill()
        self.process.wait()


def run_local(
    plan: Plan, todo: Sequence[Cell], status: Status, workers: int, threads: int | None, deadline: float | None
) -> None:
    """Run cells until none is left, or until the deadline (by ``time.monotonic``) no further one is started.

    A cell's failure is its own. A worker that dies (out of memory, killed) is replaced, and its cell
    is tried once more.
    """
    waiting, tries = deque(todo), dict.fromkeys((cell.name for cell in todo), 0)
    messages: queue.Queue[tuple[int, Any]] = queue.Queue()
    share = shares(workers, threads)
    crew: dict[int, Worker] = {}

    def feed(number: int) -> None:
        """The next cell for a worker; without one, its end."""
        late = deadline is not None and time.monotonic() >= deadline
        if waiting and not late:
            if number not in crew:
                crew[number] = Worker(number, plan, share[number], messages)
            cell = waiting.popleft()
            tries[cell.name] += 1
            status.tell({"cell": cell.name, "event": "started", "worker": number, "attempt": tries[cell.name]})
            crew[number].give(cell)
        elif number in crew:
            crew.pop(number).end()

    try:
        for number in range(min(workers, len(waiting))):
            feed(number)
        while crew:
            try:
                number, message = messages.get(timeout=PULSE)
            except queue.Empty:
                continue
            worker = crew.get(number)
            if worker is None:  # the end of a worker that was sent home
                continue
            if message is None:
                _died(crew.pop(number), waiting, tries, status)
                feed(number)
            else:
                status.tell(message)
                if message["event"] in ("done", "failed"):
                    worker.cell = None
                    feed(number)
    finally:
        for worker in crew.values():
            worker.end()


def _died(worker: Worker, waiting: deque[Cell], tries: dict[str, int], status: Status) -> None:
    """A worker's end in the middle of a cell: the cell is tried again, or it has failed."""
    code, cell = worker.process.wait(), worker.cell
    assert cell is not None, "a worker without a cell is ended, and does not die"
    why = f"its worker ended with {code}" + (" (killed: out of memory?)" if code == -9 else "")
    again = tries[cell.name] < ATTEMPTS
    status.tell({"cell": cell.name, "event": "died" if again else "failed", "error": why})
    if again:
        waiting.append(cell)
