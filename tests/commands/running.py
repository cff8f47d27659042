"""Runs laavit's commands in children that can be killed: ``python running.py``, one JSON request a line on stdin.

The imports, which take most of a short command's time, are paid once; a request forks. It is
``{"jobs": [[command, words, environment], ...], "kill_after" (seconds or null), "kill" (places in the list)}``: jobs
start together and are killed together; the answer is ``{"codes", "seconds"}``, code -9 where killed.
"""

import json
import os
import signal
import sys
import time

import torch

import laavit.commands.extract
import laavit.commands.train
import laavit.engine.runner
import laavit.model  # noqa: F401 - imported before the fork
from laavit.cli import run


def child(command: str, words: list[str], environment: dict[str, str]) -> None:
    """The command, as a process of its own would run it; never returns."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.environ.update(environment)
    os._exit(run(command, words))


def start(job: tuple[str, list[str], dict[str, str]]) -> int:
    """Fork a command; its process."""
    process = os.fork()
    if process == 0:
        child(*job)
    return process


def main() -> None:
    """Answer requests until stdin ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.monotonic()
        alive = {start(job): place for place, job in enumerate(request["jobs"])}
        codes, killed = [0] * len(alive), request["kill_after"] is None
        while alive:
            found, status = os.waitpid(-1, os.WNOHANG)
            if found:
                codes[alive.pop(found)] = os.waitstatus_to_exitcode(status)
            elif not killed and time.monotonic() - begin > request["kill_after"]:
                killed = True
                for process, place in alive.items():
                    if place in request["kill"]:
                        os.kill(process, signal.SIGKILL)
            else:
                time.sleep(0.002)
        sys.stdout.write(json.dumps({"codes": codes, "seconds": time.monotonic() - begin}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
