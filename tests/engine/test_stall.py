import logging
import os
import time

import torch
from processes import start

from laavit.engine import latest_checkpoint


def waited(pids, seconds):
    """Exit codes, or a failure when a process is still there after so long (it is ended then)."""
    until, codes = time.monotonic() + seconds, {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, 9)
                    os.waitpid(pid, 0)
            raise AssertionError(f"still there after {seconds} s: {codes}")
        time.sleep(0.05)
    return [codes[pid] for pid in pids]


def to_file(path):
    """In a child: the engine's words into a file."""
    logging.getLogger("laavit.engine").addHandler(logging.FileHandler(path))


class Hanging:
    """The fake data set, one sample of which never comes."""

    def __init__(self, data, index):
        self.data, self.index, self.groups = data, index, data.groups

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index == self.index:
            never_comes()
        return self.data[index]


def never_comes():
    time.sleep(600)


def test_one_process_hangs_in_its_data_and_the_other_in_a_collective(lab, tmp_path):
    from laavit.engine.sampler import BatchSampler

    lost = BatchSampler(24, None, batch_size=4, steps=12, seed=0).batch(5)[3][0]  # in process 1's share

    def work(rank):
        to_file(tmp_path / f"words_{rank}.txt")
        data = lab.FakeData()
        lab.run(tmp_path / "run", data=Hanging(data, lost), stall_minutes=4 / 60)

    assert waited(start(work), 60) == [2, 2]
    stacks = [(tmp_path / "run" / "stalled" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert stacks[0].startswith("process 0: in step 5") or stacks[0].startswith(
        "process 0: waiting for the data of step 5"
    )
    assert stacks[1].startswith("process 1: waiting for the data of step 5")
    assert "never_comes" in stacks[1] and "never_comes" not in stacks[0]
    assert "distributed" in stacks[0]  # torch/distributed/..., where it waits for the other
    sentence = (tmp_path / "words_0.txt").read_text().strip().splitlines()[-1]
    assert (
        "nothing has moved for 0.0667 minutes" in sentence and "process 1: waiting for the data of step 5" in sentence
    )
    assert str(tmp_path / "run" / "stalled") in sentence
    assert latest_checkpoint(tmp_path / "run").name == "iter_000004"


def test_a_run_that_moves_is_left_alone_and_leaves_no_thread(lab, tmp_path):
    import threading

    before = threading.active_count()
    lab.run(tmp_path, stall_minutes=1)
    assert threading.active_count() == before and not (tmp_path / "stalled").exists()


def test_the_watch_changes_no_bits(lab, tmp_path):
    assert lab.bits(lab.run(tmp_path / "a", stall_minutes=0).last) == lab.bits(lab.run(tmp_path / "b").last)


def test_a_collective_waits_for_longer_than_the_watch(lab, tmp_path, monkeypatch):
    from laavit.engine import distributed

    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *args, **kwargs: given.update(kwargs))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    with distributed.process_group(torch.device("cpu"), stall_minutes=30):
        pass
    assert given["timeout"].total_seconds() > 30 * 60
    with distributed.process_group(torch.device("cpu")):
        pass
    assert given["timeout"] is None
