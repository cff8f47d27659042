import json
import logging
from pathlib import Path

import pytest
import torch
from processes import launch
from safetensors.torch import load_file

from laavit.engine import TrainingStopped, latest_checkpoint
from laavit.engine.bad_batch import read_bad_batches
from laavit.engine.replay import replay
from laavit.engine.sampler import BatchSampler
from laavit.registry import UserError

ORDER = BatchSampler(24, None, batch_size=4, steps=12, seed=0)


def poison_of(step, place=0):
    """A sample that is met first in ``step``; with 24 samples and batches of 4 it comes back 6 steps later."""
    return ORDER.batch(step)[place][0]


def log(work_dir):
    return [json.loads(line) for line in (work_dir / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_stops_before_the_step_and_names_step_and_samples(lab, tmp_path, accumulate):
    poison = poison_of(5)
    model, kept = lab.FakeModel(), {}

    def keep(step):
        kept.update({n: p.detach().clone() for n, p in model.named_parameters()})

    model.set_step = lambda step: (keep(step), model.steps.append(step))
    with pytest.raises(TrainingStopped) as error:
        lab.run(tmp_path, model=model, data=lab.FakeData(poison=poison), accumulate=accumulate)
    sentence = str(error.value)
    assert sentence.startswith("step 5: the loss is nan")
    assert f"s{poison}" in sentence and "iter_000004" in sentence and "\n" not in sentence
    assert str(tmp_path / "bad_batches" / "step_000005") in sentence
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())
    assert latest_checkpoint(tmp_path).name == "iter_000004"


def test_a_gradient_that_is_not_finite_stops_too(lab, tmp_path):
    model = lab.FakeModel()
    model.student.second.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(
        TrainingStopped, match=r"step 0: the gradient's norm is (inf|nan) \(loss .*last checkpoint: none yet"
    ):
        lab.run(tmp_path, model=model)


def test_a_loss_without_gradient_is_told(lab, tmp_path, monkeypatch):
    def forward(self, batch, mode="loss"):
        return {"loss": torch.ones((), requires_grad=True) * batch.x.mean()}

    monkeypatch.setattr(lab.FakeModel, "forward", forward)
    with pytest.raises(TrainingStopped, match="no gradient"):
        lab.run(tmp_path)


def test_a_skipped_step_moves_no_weight_and_no_moment_but_the_schedule(lab, tmp_path, caplog):
    """By hand: the same 12 steps, without the optimizer's in the two where the poisoned sample stands."""
    quiet = {"dropout": 0, "python_noise": False}
    poison = poison_of(5)
    met = [step for step in range(12) if [poison] in ORDER.batch(step)]
    assert len(met) == 2
    data = lab.FakeData(poison=poison)
    with caplog.at_level(logging.WARNING, logger="laavit.engine"):
        made = lab.run(tmp_path, model=lab.FakeModel(**quiet), data=data, skip_nonfinite=2, log_every=1)
    from laavit.engine.optim import build_adamw
    from laavit.engine.schedules import schedule_factor

    plain, settings = lab.FakeModel(**quiet), lab.settings()
    optimizer = build_adamw(plain.trainable_parameters(), settings)
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * schedule_factor(step, 12, settings.warmup_steps, "linear")
        plain.set_step(step)
        plain(**lab.collate([data[index] for index in ORDER.micro_batch(step, 0)]))["loss"].backward()
        if step not in met:
            torch.nn.utils.clip_grad_norm_([p for _, p in plain.trainable_parameters()], 1.0)
            optimizer.step()
        optimizer.zero_grad()
    for name, value in plain.named_parameters():
        torch.testing.assert_close(dict(made.model.named_parameters())[name], value, rtol=1e-6, atol=1e-7)
    lines = log(tmp_path)
    assert [line["skipped"] for line in lines] == [sum(m <= step for m in met) for step in range(12)]
    assert [line["iter"] - 1 for line in lines if line["loss"] is None] == met
    told = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(told) == 2 and f"step {met[0]}: the loss is nan; skipped, 1 of 2" in told[0] and f"s{poison}" in told[0]


def test_a_run_cut_after_a_skipped_step_resumes_to_the_same_bits_and_counts_on(lab, tmp_path):
    poison = poison_of(5)
    data = lab.FakeData(poison=poison)
    whole = lab.run(tmp_path / "whole", data=data, skip_nonfinite=2)
    met = [step for step in range(12) if [poison] in ORDER.batch(step)]
    with pytest.raises(TrainingStopped, match=f"step {met[1]}: the loss is nan"):
        lab.run(tmp_path / "cut", data=data, skip_nonfinite=1)
    with pytest.raises(TrainingStopped, match=f"step {met[1]}: "):  # the first is remembered
        lab.run(tmp_path / "cut", data=data, skip_nonfinite=1, resume=True)
    resumed = lab.run(tmp_path / "cut", data=data, skip_nonfinite=2, resume=True)
    assert lab.bits(resumed.last) == lab.bits(whole.last)


def test_a_step_that_was_kept_and_then_made_counts_as_no_skipped_one(lab, tmp_path):
    with pytest.raises(TrainingStopped, match="step 5: the loss is nan"):
        lab.run(tmp_path, data=lab.FakeData(poison=poison_of(5)))
    lab.run(tmp_path, resume=True)  # mended; step 5 stays under bad_batches/, to be looked at
    lab.run(tmp_path, resume=True, steps=14, skip_nonfinite=1)
    assert (tmp_path / "bad_batches" / "step_000005").is_dir()
    assert log(tmp_path)[-1]["iter"] == 14 and log(tmp_path)[-1]["skipped"] == 0


def test_a_kept_batch_is_replayed_from_inside_its_own_folder_too(lab, tmp_path, monkeypatch, caplog):
    with pytest.raises(TrainingStopped):
        lab.run(tmp_path, data=lab.FakeData(poison=poison_of(5)))
    monkeypatch.chdir(tmp_path / "bad_batches")
    with caplog.at_level(logging.INFO, logger="laavit.engine"):
        replay(lab.FakeModel(python_noise=False), Path("step_000005"), lab.settings(), torch.device("cpu"))
    assert "iter_000004" in caplog.text and "recipe's start" not in caplog.text


def test_a_kept_batch_is_no_pickle_and_replays_to_what_was_not_finite(lab, tmp_path, caplog):
    poison = poison_of(5)
    with pytest.raises(TrainingStopped):
        lab.run(tmp_path, data=lab.FakeData(poison=poison), accumulate=2)
    folder = tmp_path / "bad_batches" / "step_000005"
    assert sorted(p.name for p in folder.iterdir()) == ["rank_0.json", "rank_0.safetensors"]
    kept = read_bad_batches(folder)[0]
    assert kept.facts["samples"] == [f"s{unit[0]}" for unit in ORDER.batch(5)] and len(kept.batches) == 2
    batch = kept.batches[0]["batch"]
    assert torch.equal(batch.x[0], lab.FakeData().x[poison]) and batch.y[0].isnan().all()
    model = lab.FakeModel(python_noise=False)
    with caplog.at_level(logging.INFO, logger="laavit.engine"):
        first, second = replay(model, folder, lab.settings(), torch.device("cpu"))
    assert first["samples"] == kept.facts["samples"][:2] and first["parameters"]
    assert first["figures"]["ntp"] != first["figures"]["ntp"] and second["parameters"] == []
    weights = load_file(tmp_path / "checkpoints" / "iter_000004" / "model.safetensors")
    assert torch.equal(model.student.first.weight, weights["student.first.weight"])
    assert "iter_000004" in caplog.text and "gradients that are not: student.first.weight" in caplog.text
    assert "all finite with these weights" in caplog.text
    with pytest.raises(UserError, match="holds no kept batch"):
        read_bad_batches(tmp_path)


def test_a_replay_has_the_dropout_of_the_step(lab, tmp_path):
    seen = []

    class Seen(lab.FakeModel):
        def forward(self, batch, mode="loss"):
            out = super().forward(batch, mode)
            seen.append(float(out["ntp"].detach()))
            return out

    poison, given = poison_of(5), {"accumulate": 2, "checkpoint_every": 5}
    with pytest.raises(TrainingStopped):
        lab.run(tmp_path, model=Seen(python_noise=False), data=lab.FakeData(poison=poison), **given)
    torch.manual_seed(99)
    folder = tmp_path / "bad_batches" / "step_000005"
    found = replay(lab.FakeModel(python_noise=False), folder, lab.settings(), torch.device("cpu"))
    assert found[1]["figures"]["ntp"] == seen[-1]  # its weights are those of the checkpoint


def test_a_module_whose_output_is_not_finite_is_named(lab, tmp_path):
    model = lab.FakeModel()

    def burst(module, given, output):
        return output * float("inf")

    handle = model.student.first.register_forward_hook(burst)
    model.student.second.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(TrainingStopped):
        lab.run(tmp_path, model=model)
    handle.remove()
    fresh = lab.FakeModel()
    fresh.student.first.register_forward_hook(burst)
    found = replay(fresh, tmp_path / "bad_batches" / "step_000000", lab.settings(), torch.device("cpu"))
    assert found[0]["modules"][0] == "student.first"


def test_two_processes_skip_together_and_only_the_one_with_the_sample_keeps_it(lab, tmp_path):
    poison = poison_of(5, place=3)  # in process 1's share
    data = lab.FakeData(poison=poison)

    def work(rank):
        lab.run(tmp_path, data=data, skip_nonfinite=2, log_every=1)

    assert launch(work) == [0, 0]
    last = latest_checkpoint(tmp_path)
    assert last.name == "iter_000012"
    assert log(tmp_path)[-1]["skipped"] == 2
    weights = load_file(last / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert [p.name for p in (tmp_path / "bad_batches" / "step_000005").glob("*.json")] == ["rank_1.json"]
