"""Processes of one run, forked, with the environment that torchrun gives."""

import os
import socket
import sys
import traceback

import torch


def child(work):
    """Run ``work`` in a forked process; returns its id. Forking shares the imports, which take seconds."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            if code:
                traceback.print_exception(sys.exc_info()[1])
            os._exit(code)
    return pid


def start(work, world=2):
    """Start ``work(rank)`` in ``world`` processes; returns their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def member(rank):
        own = {**given, "RANK": rank, "LOCAL_RANK": rank} if world > 1 else {}
        os.environ.update({name: str(value) for name, value in own.items()})
        work(rank)

    return [child(lambda rank=rank: member(rank)) for rank in range(world)]


def ended(pids):
    """Their exit codes, a signal's number below 0."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def launch(work, world=2):
    """Start them and wait; returns their exit codes."""
    return ended(start(work, world))
