"""Cells one after another, each stage a command of its own, under torchrun where there are several processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from laavit.registry import UserError
from laavit.sweeps.cell import tail
from laavit.sweeps.plan import Cell, Plan
from laavit.sweeps.status import Status
from laavit.sweeps.worker import attempt

#: what is split over the processes; an export is a copy
SPLIT = ("train", "eval")


def command(words: Sequence[str], processes: int) -> list[str]:
    """The command line of a stage."""
    if processes == 1 or words[0] not in SPLIT:
        return [sys.executable, "-m", "laavit.cli", *words]
    split = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return [sys.executable, "-m", *split, "-m", "laavit.cli", *words]


def launched(log: Path, processes: int) -> Callable[[Sequence[str]], None]:
    """What runs a stage and appends what it says to a log.

    Raises (when called):
        UserError: the stage ended with another code than 0.
    """

    def call(words: Sequence[str]) -> None:
        with log.open("a", encoding="utf-8") as file:
            done = subprocess.run(command(words, processes), stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            said = "".join(line for line in tail(log) if line.startswith("error: "))
            raise UserError(f"'laavit {words[0]}' ended with {done.returncode} {said.removeprefix('error: ')}".strip())

    return call


def run_in_turn(plan: Plan, todo: Sequence[Cell], status: Status, processes: int, deadline: float | None) -> None:
    """Run cells until none is left, or until the deadline (by ``time.monotonic``) no further one is started."""
    for cell in todo:
        if deadline is not None and time.monotonic() >= deadline:
            return
        log, started = plan.folder(cell) / "log.txt", time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        status.tell({"cell": cell.name, "event": "started"})
        found = attempt(plan, cell, status.tell, launched(log, processes))
        status.tell({"cell": cell.name, "seconds": round(time.monotonic() - started, 1), **found})
