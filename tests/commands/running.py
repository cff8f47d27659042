"""Runs laavit's commands in children that can be killed: ``python running.py``, one JSON request a line on stdin.

The imports, which take most of a short command's time, are paid once; a request forks. It is
``{"command", "words", "kill_after" (seconds or null)}``; the answer is ``{"code", "seconds"}``, code -9 when killed.
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


def child(command: str, words: list[str]) -> None:
    """The command, as a process of its own would run it; never returns."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os._exit(run(command, words))


def main() -> None:
    """Answer requests until stdin ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.monotonic()
        process = os.fork()
        if process == 0:
            child(request["command"], request["words"])
        status = None
        while status is None:
            found, code = os.waitpid(process, os.WNOHANG)
            if found:
                status = os.waitstatus_to_exitcode(code)
            elif request["kill_after"] is not None and time.monotonic() - begin > request["kill_after"]:
                os.kill(process, signal.SIGKILL)
                status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            else:
                time.sleep(0.002)
        sys.stdout.write(json.dumps({"code": status, "seconds": time.monotonic() - begin}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
