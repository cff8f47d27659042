"""Background writing, full disks, the best checkpoint, the room on the disk."""

import errno
import logging
import os
import resource
import shutil
import threading
import time
from collections import namedtuple

import pytest
import torch
from mmengine.hooks import Hook
from processes import child, ended, launch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from laavit.engine import TrainingStopped, latest_checkpoint, saving
from laavit.engine.checkpoint import best_checkpoint, read_state
from laavit.engine.disk import most_at_once
from laavit.registry import UserError

FULL = OSError(errno.ENOSPC, "No space left on device")


def names(work_dir):
    return sorted(p.name for p in (work_dir / "checkpoints").iterdir())


class Slow:
    """A model's ``save_checkpoint`` that takes its time, and fails at given calls."""

    def __init__(self, model, seconds=0.0, failing=()):
        self.real, self.seconds, self.failing, self.calls, self.threads = model.save_checkpoint, seconds, failing, 0, []
        model.save_checkpoint = self

    def __call__(self, folder, state=None):
        self.calls += 1
        self.threads.append(threading.current_thread() is threading.main_thread())
        time.sleep(self.seconds)
        if self.calls in self.failing:
            raise FULL
        self.real(folder, state)


class Marks(Hook):
    """When each step ended."""

    priority = "LOWEST"

    def __init__(self):
        self.times = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.times.append(time.perf_counter())


@pytest.mark.parametrize("kind", ["consolidated", "sharded"])
def test_written_in_the_background_a_checkpoint_has_the_same_bits(lab, tmp_path, kind, monkeypatch):
    """The weights go on changing while the copies of step 4 are being written."""
    given = {"checkpoint_format": kind, "keep_last": 0}
    lab.run(tmp_path / "plain", **given)
    real = saving.Saver._fill

    def late(self, *args):
        time.sleep(0.2)
        real(self, *args)

    monkeypatch.setattr(saving.Saver, "_fill", late)
    lab.run(tmp_path / "late", checkpoint_async=True, **given)
    assert names(tmp_path / "plain") == names(tmp_path / "late") == ["iter_000004", "iter_000008", "iter_000012"]
    for folder in (tmp_path / "plain" / "checkpoints").iterdir():
        for file in folder.rglob("*.safetensors"):
            other = tmp_path / "late" / "checkpoints" / file.relative_to(folder.parent)
            ours, theirs = load_file(file), load_file(other)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_only_what_learns_is_copied(lab, tmp_path, monkeypatch):
    copied, real = set(), saving.Copies.of

    def told(self, tensors):
        copied.update(tensors)
        return real(self, tensors)

    monkeypatch.setattr(saving.Copies, "of", told)
    model = lab.FakeModel()
    model.student.twin = model.student.first  # tied
    model.save_checkpoint = lambda folder, state: save_file(
        {name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    lab.run(tmp_path, model=model, checkpoint_async=True, steps=1)
    weights = {f"student.{layer}.{kind}" for layer in ("first", "second", "twin") for kind in ("weight", "bias")}
    assert {name for name in copied if "/" not in name} == weights
    found = load_file(tmp_path / "checkpoints" / "iter_000001" / "model.safetensors")
    assert torch.equal(found["student.twin.weight"], model.student.first.weight)


def test_steps_do_not_wait_for_a_write_in_the_background_and_the_end_does(lab, tmp_path):
    model, marks = lab.FakeModel(), Marks()
    slow = Slow(model, seconds=1.0)
    last = lab.run(tmp_path, model=model, steps=7, hooks=[marks], checkpoint_async=True).last
    assert slow.threads == [False, False] and last.name == "iter_000007"
    assert marks.times[5] - marks.times[3] < 1.0 <= marks.times[6] - marks.times[3]  # 7 waits for 4, then for itself


def test_a_write_that_failed_in_the_background_is_told_at_the_next_checkpoint(lab, tmp_path):
    model = lab.FakeModel()
    Slow(model, failing=(2,))
    with pytest.raises(TrainingStopped, match=r"checkpoint of step 8 could not .*iter_000004': make room"):
        lab.run(tmp_path, model=model, checkpoint_async=True, steps=16)
    assert names(tmp_path) == ["iter_000004"] and model.steps[-1] == 11


def test_a_run_that_stops_for_another_reason_still_writes_and_tells(lab, tmp_path, caplog):
    class Stop(Hook):
        priority = "LOWEST"

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if batch_idx + 1 == stop:
                raise KeyboardInterrupt

    model, stop = lab.FakeModel(), 5
    Slow(model, seconds=0.3)
    with pytest.raises(KeyboardInterrupt):
        lab.run(tmp_path, model=model, hooks=[Stop()], checkpoint_async=True)
    assert names(tmp_path) == ["iter_000004"]
    model, stop = lab.FakeModel(), 9
    Slow(model, seconds=0.3, failing=(1,))
    with caplog.at_level(logging.ERROR), pytest.raises(KeyboardInterrupt):
        lab.run(tmp_path, model=model, hooks=[Stop()], checkpoint_async=True, resume=True)
    assert "the checkpoint of step 8 could not be written" in caplog.text
    assert names(tmp_path) == ["iter_000004"]


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_tried_again_until_there_is_room(lab, tmp_path, caplog, monkeypatch, background):
    monkeypatch.setattr(saving, "PAUSES", (0.01, 0.02))
    whole, model = lab.run(tmp_path / "whole"), lab.FakeModel()
    slow = Slow(model, failing=(2, 3, 4))
    made = lab.run(tmp_path / "cut", model=model, disk_retry_s=10, checkpoint_async=background)
    assert slow.calls == 6 and caplog.text.count("make room; trying again in") == 3
    assert lab.bits(made.last) == lab.bits(whole.last)
    assert names(tmp_path / "cut") == ["iter_000008", "iter_000012"]


def test_a_tokenizer_that_finds_the_disk_full_is_waited_for_too(lab, tmp_path):
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    model, written, places = lab.FakeModel(), lab.FakeModel().save_checkpoint, ["/dev/full", "tokenizer.json"]
    model.save_checkpoint = lambda folder: (written(folder), tokenizer.save(str(folder / places[0])), places.pop(0))
    with pytest.raises(TrainingStopped, match=r"step 4 could not be written .*No space left on device"):
        lab.run(tmp_path, model=model)
    assert names(tmp_path) == []

    def wrong(folder):
        raise ValueError("(os error 28) in a sentence of somebody else's")

    model.save_checkpoint = wrong
    with pytest.raises(ValueError, match="somebody else's"):
        lab.run(tmp_path, model=model)


def test_two_processes_try_again_and_stop_together(lab, tmp_path, monkeypatch):
    """Process 1 alone cannot write its shards: process 0 waits with it, then both say so."""
    monkeypatch.setattr(saving, "PAUSES", (0.01, 0.02))
    real = saving.write_shards

    def work(rank):
        failed = []

        def full(folder, tensors, group):
            real(folder, tensors, group)
            if rank == 1 and (len(failed) < 2 or "iter_000008" in str(folder)):
                failed.append(folder)
                raise FULL

        saving.write_shards = full
        with pytest.raises(TrainingStopped, match=r"checkpoint of step 8 .*No space left.*iter_000004"):
            lab.run(tmp_path, checkpoint_format="sharded", disk_retry_s=0.05)

    assert launch(work, 2) == [0, 0]
    assert names(tmp_path) == ["iter_000004"]


def test_shards_that_the_system_refuses_are_told(lab, tmp_path):
    """The kernel itself cuts the write short (RLIMIT_FSIZE), inside PyTorch's writer, whose errors are no OSErrors."""
    told, model = tmp_path / "told.txt", lab.FakeModel()
    model.student.large = torch.nn.Linear(64, 256)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        try:
            lab.run(tmp_path / "run", model=model, checkpoint_format="sharded", checkpoint_async=True)
        except TrainingStopped as error:
            told.write_text(str(error))

    assert ended([child(work)]) == [0]
    assert "step 4 could not" in told.read_text() and "File too large" in told.read_text()
    assert names(tmp_path / "run") == []


class Figure(Hook):
    """Gives the runner the figures of the step, by a list of values for ``probe/in_box``."""

    priority = "LOW"  # after the log's, before the checkpoint's

    def __init__(self, values):
        self.values = values

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        value = self.values[batch_idx // 4]
        runner.figures = {} if value is None else {"probe/in_box": value}


def test_the_best_checkpoint_is_marked_and_stays(lab, tmp_path, caplog):
    given = {"steps": 20, "keep_last": 1, "checkpoint_every": 4}
    rule = {"keep_best": "probe/in_box:max"}
    lab.run(tmp_path / "max", hooks=[Figure([None, 0.5, 0.7, 0.6, 0.7])], **given, **rule)
    assert names(tmp_path / "max") == ["best", "iter_000012", "iter_000020"]
    best = tmp_path / "max" / "checkpoints" / "best"
    assert os.readlink(best) == "iter_000012" and read_state(best)["figures"] == {"probe/in_box": 0.7}
    assert "no 'probe/in_box' in the last logged figures" in caplog.text
    assert best_checkpoint(tmp_path / "max", "probe/in_box:min").name == "iter_000012"  # the earlier of equals
    assert latest_checkpoint(tmp_path / "max").name == "iter_000020"
    longer = {**given, "steps": 24, "keep_best": "probe/in_box:min"}
    lab.run(tmp_path / "max", hooks=[Figure([0.9] * 6)], resume=True, **longer)
    assert names(tmp_path / "max") == ["best", "iter_000012", "iter_000024"]
    assert caplog.text.count("no 'probe/in_box'") == 1  # once a run
    lab.run(tmp_path / "max", resume=True, **{**given, "steps": 28})
    assert names(tmp_path / "max") == ["iter_000028"]  # no link to what has gone


def test_a_rule_for_the_best_is_checked_at_once(lab):
    for text in ("ntp", "ntp:least", ":min"):
        with pytest.raises(UserError, match=f"train.keep_best: got '{text}'; allowed: FIGURE:min or FIGURE:max"):
            lab.settings(keep_best=text)
    with pytest.raises(UserError, match=r"train.checkpoint_format: got 'shards'"):
        lab.settings(checkpoint_format="shards")


def test_the_room_on_the_disk_is_looked_at_before_the_first_step(lab, tmp_path, monkeypatch, caplog):
    """114 trained and 12 frozen numbers of 4 bytes: 504 of weights, 912 of moments."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free))
    free, model = 1415, lab.FakeModel()
    with pytest.raises(UserError, match=r"takes about 1.42e-06 GB, and '.*' has 1.42e-06 GB free: make room"):
        lab.run(tmp_path, model=model)
    assert model.steps == []
    free = 3 * 1416 - 1
    lab.run(tmp_path)
    assert "while up to 3 are there at once: make room, or lower train.keep_last" in caplog.text
    caplog.clear()
    free = 3 * 1416
    lab.run(tmp_path / "enough")
    assert "make room" not in caplog.text
    free = 3 * (456 + 912)  # enough for shards, which leave the frozen weights out, and not for the last checkpoint
    lab.run(tmp_path / "shards", checkpoint_format="sharded")
    assert "takes about 1.37e-06 GB (the last one 1.42e-06 GB), " in caplog.text


def test_how_many_are_there_at_once(lab):
    for count, given in [(3, {}), (4, {"keep_best": "ntp:min"}), (1, {"checkpoint_every": 0}), (10, {"keep_last": 0})]:
        settings = lab.settings(**{"steps": 100, "checkpoint_every": 10, **given})
        assert most_at_once(settings, 0) == count
    assert most_at_once(lab.settings(steps=100), 100) == 0
