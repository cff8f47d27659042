"""A process that runs one cell after another: ``python -m laavit.sweeps.worker OUT/sweep.json CORES``.

It reads names of cells from standard input and writes a JSON object a line to standard output: ``{"cell", "event"}``
with the event 'stage' (and its name), 'done' or 'failed' (and the error). What a cell says goes to its own
``log.txt``, whatever writes it. When standard input ends, the one who started it is gone, and so is the worker.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from laavit.registry import UserError

# By name, since the module is run as a script.
logger = logging.getLogger("laavit.sweeps.worker")


def pin(cores: Sequence[int]) -> None:
    """Keep to these cores, where the system can be told."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def names(source: IO[str]) -> Iterator[str]:
    """Names from a stream; at its end the process ends at once, in the middle of a cell too."""
    waiting: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in source:
            waiting.put(line.strip())
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        yield waiting.get()


@contextmanager
def written_to(log: Path) -> Iterator[None]:
    """Standard output and error of the whole process, libraries included, appended to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, former in zip((1, 2), kept):
                os.dup2(former, descriptor)
                os.close(former)


def attempt(plan: Any, cell: Any, tell: Any, call: Callable[[Sequence[str]], None]) -> dict[str, Any]:
    """Run a cell by ``run_cell``; whatever goes wrong in it is its own failure, and the next one's turn comes."""
    from laavit.sweeps.cell import run_cell

    try:
        run_cell(plan, cell, call, lambda name: tell({"cell": cell.name, "event": "stage", "stage": name}))
    except UserError as error:
        logger.error("error: %s", error)
        return {"event": "failed", "error": str(error)}
    except (Exception, SystemExit) as error:
        logger.exception("the cell failed")
        return {"event": "failed", "error": f"{type(error).__name__}: {error}"}
    return {"event": "done"}


def main(argv: Sequence[str]) -> int:
    """Run cells until standard input ends."""
    file, cores = Path(argv[0]), [int(core) for core in argv[1].split(",") if core]
    pin(cores)
    channel = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")

    def tell(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    asked = names(sys.stdin)  # listens from now on, also while the imports below take their time
    first = next(asked)
    import torch

    from laavit.sweeps.cell import in_process
    from laavit.sweeps.plan import Plan

    # One thread a core, and a fixed number: other numbers sum in other orders.
    torch.set_num_threads(max(1, len(cores)))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("laavit").setLevel(os.environ.get("LAAVIT_LOG", "INFO").upper())
    plan = Plan.read(file)
    name = first
    while True:
        cell, started = plan.cell(name), time.monotonic()
        with written_to(plan.folder(cell) / "log.txt"):
            found = attempt(plan, cell, tell, in_process)
        tell({"cell": name, "seconds": round(time.monotonic() - started, 1), **found})
        name = next(asked)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
