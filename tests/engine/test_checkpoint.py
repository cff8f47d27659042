import json
import os
import random
import resource
import signal
import time

import numpy as np
import pytest
import torch
from processes import child
from safetensors.torch import load_file

from laavit.engine import TrainingStopped, latest_checkpoint, random_state
from laavit.engine.hooks.log import truncate_log
from laavit.registry import UserError


def names(work_dir):
    return sorted(p.name for p in (work_dir / "checkpoints").iterdir())


def stop_at(lab, step):
    from mmengine.hooks import Hook

    class Stop(Hook):
        priority = "LOWEST"

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if batch_idx + 1 == step:
                raise KeyboardInterrupt

    return Stop()


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "workers": 1}, {"precision": "bf16", "schedule": "cosine"}])
def test_resumed_run_ends_with_the_same_bits_and_log(lab, tmp_path, changes):
    whole = lab.run(tmp_path / "whole", **changes)
    for step in (3, 6, 11):  # before the first checkpoint, and between checkpoints
        with pytest.raises(KeyboardInterrupt):
            lab.run(tmp_path / "cut", hooks=[stop_at(lab, step)], resume=True, **changes)
    resumed = lab.run(tmp_path / "cut", resume=True, **changes)
    assert resumed.model.steps == [8, 9, 10, 11]
    assert lab.bits(resumed.last) == lab.bits(whole.last)

    def figures(folder):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        measured = ("second", "data_share", "memory", "mfu")
        return [{k: v for k, v in line.items() if not any(word in k for word in measured)} for line in lines]

    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


def test_killed_at_random_moments_and_resumed_gives_the_same_bits(lab, tmp_path):
    changes = {"steps": 120, "checkpoint_every": 3, "log_every": 1}
    started = time.monotonic()
    whole = lab.run(tmp_path / "whole", **changes)
    duration = time.monotonic() - started
    moments, kills, done = random.Random(), 0, False
    for _ in range(60):
        pid = child(lambda: lab.run(tmp_path / "cut", resume=True, **changes))
        if kills < 8:
            time.sleep(moments.uniform(0.02, 0.2) * duration)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills += os.WIFSIGNALED(status)
        done = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        if done:
            break
    assert done and kills >= 2
    last = latest_checkpoint(tmp_path / "cut")
    assert lab.bits(last) == lab.bits(whole.last)
    steps = [json.loads(line)["iter"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 121))
    assert not [name for name in names(tmp_path / "cut") if name.startswith(".")]


def test_a_run_does_not_go_on_to_an_earlier_step(lab, tmp_path):
    lab.run(tmp_path, steps=4)
    with pytest.raises(UserError, match=r"train.steps: got 3, and the run in '.*' has done 4"):
        lab.run(tmp_path, steps=3, resume=True)


def test_going_on_with_another_recipe_is_warned_of(lab, tmp_path, caplog):
    lab.run(tmp_path, steps=2)
    lab.run(tmp_path, steps=3, resume=True)
    assert "another recipe" not in caplog.text
    (tmp_path / "recipe.json").write_text('{"title": "fake", "gate": {"type": "CosineGate"}}')
    lab.run(tmp_path, steps=4, resume=True)
    assert "from step 3 on with another recipe, and not to the same bits: gate" in caplog.text


def test_a_finished_run_resumes_to_itself_with_its_weights(lab, tmp_path):
    made = lab.run(tmp_path)
    before = lab.bits(made.last)
    again = lab.run(tmp_path, resume=True)
    assert again.last == made.last and lab.bits(again.last) == before and again.model.steps == []
    assert torch.equal(again.model.student.first.weight, made.model.student.first.weight)


def test_a_run_is_never_overwritten_silently(lab, tmp_path):
    lab.run(tmp_path)
    with pytest.raises(UserError, match=r"already holds a run up to 'iter_000012': add --resume"):
        lab.run(tmp_path)


def test_resuming_with_other_data_or_order_is_refused_and_other_settings_are_told(lab, tmp_path, caplog):
    lab.run(tmp_path)
    with pytest.raises(UserError, match=r"train.seed: got 1, but the run in .* has 0"):
        lab.run(tmp_path, resume=True, seed=1)
    with pytest.raises(UserError, match=r"data set differs .*24 samples then"):
        lab.run(tmp_path, resume=True, data=lab.FakeData(22))
    longer = lab.run(tmp_path, resume=True, steps=14)
    assert longer.last.name == "iter_000014"
    assert "steps 12 -> 14" in caplog.text


def test_what_the_lengths_depend_on_is_named_where_the_order_depends_on_lengths(lab, tmp_path):
    class Known(lab.FakeData):
        def lengths(self, places):
            return np.array([[4, 2]] * len(places))

    lab.run(tmp_path, data=Known(24), bucketing=2)
    with pytest.raises(UserError, match=r"train.shared_prefix: got True, but the run in .* has False"):
        lab.run(tmp_path, resume=True, data=Known(24), bucketing=2, shared_prefix=True)


def test_a_damaged_checkpoint_is_passed_over(lab, tmp_path, caplog):
    made = lab.run(tmp_path)
    weights = made.last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert latest_checkpoint(tmp_path).name == "iter_000008"
    assert "incomplete" in caplog.text
    again = lab.run(tmp_path, resume=True)
    assert again.model.steps == [8, 9, 10, 11]
    assert weights.stat().st_size == made.last.joinpath("model.safetensors").stat().st_size
    assert load_file(weights)


def test_a_full_disk_stops_with_one_sentence_and_leaves_the_last_checkpoint(lab, tmp_path, monkeypatch):
    real, model = lab.FakeModel.save_checkpoint, lab.FakeModel()

    def full(self, folder):
        real(self, folder)
        if self.steps[-1] >= 7:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(lab.FakeModel, "save_checkpoint", full)
    with pytest.raises(TrainingStopped) as error:
        lab.run(tmp_path, model=model)
    sentence = str(error.value)
    assert "step 8" in sentence and "No space left on device" in sentence and "iter_000004" in sentence
    assert "\n" not in sentence
    assert names(tmp_path) == ["iter_000004"]
    monkeypatch.undo()
    whole = lab.run(tmp_path / "whole")
    assert lab.bits(lab.run(tmp_path, resume=True).last) == lab.bits(whole.last)


def test_a_write_that_the_system_refuses_is_caught_whoever_writes(lab, tmp_path):
    """The kernel itself cuts the write short (RLIMIT_FSIZE), inside safetensors, which has an error type of its own."""
    told = tmp_path / "told.txt"
    lab.run(tmp_path / "run", steps=4)
    first = lab.bits(tmp_path / "run" / "checkpoints" / "iter_000004")
    biggest = max(len(part) for part in first.values())

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (biggest - 100, biggest - 100))
        try:
            lab.run(tmp_path / "run", steps=8, resume=True)
        except TrainingStopped as error:
            told.write_text(str(error))

    os.waitpid(child(work), 0)
    assert "File too large" in told.read_text() and "iter_000004" in told.read_text()
    assert names(tmp_path / "run") == ["iter_000004"]
    assert lab.bits(tmp_path / "run" / "checkpoints" / "iter_000004") == first


def test_a_changed_model_is_told_by_parameter(lab, tmp_path):
    lab.run(tmp_path, steps=4)
    model = lab.FakeModel()
    model.student.second.bias.requires_grad_(False)
    with pytest.raises(UserError, match=r"'student.second.bias' is only in the checkpoint"):
        lab.run(tmp_path, model=model, resume=True)


def test_log_is_cut_to_the_resumed_step_and_to_whole_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"iter": 1}\n{"iter": 4}\n{"iter": 6}\n{"iter"')
    truncate_log(path, 4)
    assert path.read_text() == '{"iter": 1}\n{"iter": 4}\n'
    truncate_log(tmp_path / "none.jsonl", 4)


def test_all_generators_are_restored(tmp_path):
    cpu = torch.device("cpu")

    def draw():
        return (
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(),
            np.random.rand(),
            torch.rand(3).tolist(),
        )

    random.gauss(0, 1)
    np.random.standard_normal()  # both now hold a spare normal
    state = random_state.capture(cpu)
    want = draw()
    draw()
    assert random_state.restore(state, cpu)
    assert draw() == want
