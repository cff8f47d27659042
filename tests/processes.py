"""Two processes of one run, with the environment that torchrun gives."""

import os
import socket


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(lab, work):
    """Fork two processes that call ``work(rank)``; returns their ids."""
    port, pids = str(free_port()), []
    for rank in range(2):

        def member(rank=rank):
            given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in given.items()})
            work(rank)

        pids.append(lab.child(member))
    return pids


def launch(lab, work):
    """The same, to their end; returns their exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in start(lab, work)]
