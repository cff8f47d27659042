"""Two processes of one run, with the environment that torchrun gives."""

import os
import socket
import sys
import traceback

import torch


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def start(work):
    """Fork two processes that call ``work(rank)``; returns their ids."""
    port, pids = str(free_port()), []
    for rank in range(2):

        def member(rank=rank):
            given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in given.items()})
            work(rank)

        pids.append(child(member))
    return pids


def launch(work):
    """The same, to their end; returns their exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in start(work)]
