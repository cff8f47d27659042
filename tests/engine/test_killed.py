"""SIGKILL at random moments: what is left can be read, and the run ends as if nothing had happened."""

import logging
import os
import random
import signal
import time

import pytest
import torch
from processes import ended, launch, start
from safetensors.torch import load_file

from laavit.engine import latest_checkpoint, saving
from laavit.engine.checkpoint import is_complete, read_state
from laavit.engine.strategies import FSDP2

logger = logging.getLogger(__name__)

#: format, in the background, strategy
WAYS = {
    "sharded": ("sharded", False, None),
    "sharded, in the background": ("sharded", True, None),
    "consolidated, in the background": ("consolidated", True, None),
    "fsdp2, in the background": ("sharded", True, FSDP2),
}
QUIET = {"dropout": 0, "python_noise": False}


def slowly(rank):
    """Stay longer in the middle of a write, where a kill does most harm."""
    fill, publish = saving.Saver._fill, saving.Saver._publish

    def slow(real):
        def part(self, *args):
            time.sleep(0.04)
            real(self, *args)
            time.sleep(0.04)

        return part

    saving.Saver._fill, saving.Saver._publish = slow(fill), slow(publish)


def work_of(lab, folder, way, model, steps):
    kind, background, strategy = WAYS[way]

    def work(rank):
        slowly(rank)
        given = {"checkpoint_format": kind, "checkpoint_async": background, "checkpoint_every": 1, "log_every": 1}
        made = strategy() if strategy else None
        lab.run(folder, model=lab.FakeModel(**model), steps=steps, resume=True, strategy=made, **given)

    return work


def check(folder):
    """Every checkpoint that has its name is complete, and every tensor in it can be read; are there half ones too?"""
    root = folder / "checkpoints"
    for checkpoint in root.glob("iter_*"):
        assert is_complete(checkpoint), checkpoint
        assert read_state(checkpoint)["iter"] == int(checkpoint.name.removeprefix("iter_"))
        for file in checkpoint.rglob("*.safetensors"):
            load_file(file)
    return any(root.glob(".tmp-iter_*"))


def killed(lab, work, world, seed, folder):
    """Start, kill one process or all at a random moment, and the others as torchrun does; was anything killed?"""
    choice, root = random.Random(seed), folder / "checkpoints"
    before, pids = {path.name for path in root.glob("*iter_*")}, start(work, world)
    if choice.random() < 0.2:
        time.sleep(choice.uniform(0, 1.5))  # while it starts
    else:
        end = time.monotonic() + 60
        while {path.name for path in root.glob("*iter_*")} <= before and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(choice.uniform(0, 0.6))
    for pid in [choice.choice(pids)] if choice.random() < 0.5 else pids:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.05)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)  # those that have ended are still there to be waited for
    return any(code == -signal.SIGKILL for code in ended(pids))


def survive(lab, tmp_path, way, seeds, worlds, model, steps=24):
    """One run, killed at every seed's moment and started again; returns it, kills, and kills that left a half write."""
    folder, kills, halves = tmp_path / "cut", 0, 0
    for turn, seed in enumerate(seeds):
        work = work_of(lab, folder, way, model, steps)
        hit = killed(lab, work, worlds[turn % len(worlds)], seed, folder)
        kills, halves = kills + hit, halves + (folder.exists() and check(folder))
        done = latest_checkpoint(folder) if folder.exists() else None
        if done is not None and done.name == f"iter_{steps:06d}":
            break
    world = worlds[(turn + 1) % len(worlds)]
    assert launch(work_of(lab, folder, way, model, steps), world) == [0] * world
    check(folder)
    return latest_checkpoint(folder), kills, halves


def close(ours, theirs):
    theirs = load_file(theirs / "model.safetensors")
    for name, value in load_file(ours / "model.safetensors").items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_two_processes_survive_three_kills_in_the_middle_of_shards_in_the_background(lab, tmp_path):
    way = "sharded, in the background"
    assert launch(work_of(lab, tmp_path / "whole", way, {}, 12), 2) == [0, 0]
    last, kills, _ = survive(lab, tmp_path, way, [1, 2, 3], [2], {}, 12)
    assert kills >= 2
    assert lab.bits(last) == lab.bits(latest_checkpoint(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(("way", "first"), [(way, 100 * number) for number, way in enumerate(WAYS)])
def test_ten_kills_each_way(lab, tmp_path, way, first):
    """40 kills together: two processes before and after, the same bits."""
    assert launch(work_of(lab, tmp_path / "whole", way, {}, 24), 2) == [0, 0]
    whole, kills, halves, turn = latest_checkpoint(tmp_path / "whole"), 0, 0, 0
    while kills < 10:
        seeds = range(first + 10 * turn, first + 10 * turn + 10 - kills)
        last, more, left = survive(lab, tmp_path / str(turn), way, seeds, [2], {})
        kills, halves, turn = kills + more, halves + left, turn + 1
        assert lab.bits(last) == lab.bits(whole)
    logger.info("%s: %d kills, %d of them in the middle of a write, %d runs", way, kills, halves, turn)
    assert halves


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [[2, 1], [1, 2]])
@pytest.mark.parametrize("way", ["sharded, in the background", "consolidated, in the background"])
def test_kills_while_the_number_of_processes_changes(lab, tmp_path, way, worlds):
    whole = lab.run(tmp_path / "whole", model=lab.FakeModel(**QUIET), steps=24)
    last, kills, halves = survive(lab, tmp_path, way, range(1000, 1006), worlds, QUIET)
    logger.info("%s, %s processes in turn: %d kills, %d in the middle of a write", way, worlds, kills, halves)
    assert kills >= 2
    close(last, whole.last)
