import json
import logging
import statistics
import subprocess
import sys
import time

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.visualization import Visualizer
from safetensors.torch import load_file

from laavit.engine.sampler import BatchSampler
from laavit.engine.schedules import schedule_factor
from laavit.registry import UserError


def log(work_dir):
    return [json.loads(line) for line in (work_dir / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_is_needed_to_repeat_it(lab, tmp_path):
    made = lab.run(tmp_path, tensorboard=True)
    assert made.last == tmp_path / "checkpoints" / "iter_000012"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *[".lock", "checkpoints", "environment.json", "log.jsonl", "recipe.json", "tensorboard"]
    ]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["iter_000008", "iter_000012"]  # keep_last
    assert sorted(p.name for p in made.last.iterdir()) == [
        *["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
    ]
    assert json.loads((tmp_path / "recipe.json").read_text()) == {"title": "fake"}
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (environment["seed"], environment["threads"], environment["data"]) == (0, 1, "abc")
    state = json.loads((made.last / "state.json").read_text())
    assert (state["iter"], state["data"]["step"], state["scheduler"]) == (12, 12, {"last_step": 12})
    assert next((tmp_path / "tensorboard").glob("events.*")).stat().st_size > 500


def test_the_log_holds_the_figures_of_the_step_and_the_rate_that_was_used(lab, tmp_path):
    lab.run(tmp_path)
    lines = log(tmp_path)
    assert [line["iter"] for line in lines] == [1, 2, 4, 6, 8, 10, 12]
    for line in lines:
        step = line["iter"] - 1
        assert line["lr"] == pytest.approx(1e-2 * schedule_factor(step, 12, 1, "linear"))
        assert line["gamma"] == pytest.approx(min(1, step / 10))
        assert line["loss"] == pytest.approx(line["ntp"] * (1 + line["gamma"]), rel=1e-5)
        assert {"grad_norm", "step_seconds", "data_seconds", "seconds", "epoch"} <= set(line)
    assert lines[-1]["epoch"] == 2


def test_equals_a_loop_written_by_hand(lab, tmp_path):
    ours = lab.run(tmp_path, model=lab.FakeModel(dropout=0, python_noise=False)).model
    plain, data, s = lab.FakeModel(dropout=0, python_noise=False), lab.FakeData(), lab.settings()
    names = dict(plain.trainable_parameters())
    groups = [
        {"params": [p for p in names.values() if p.ndim == d], "weight_decay": w} for d, w in ((2, 0.1), (1, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999))
    order = BatchSampler(24, None, batch_size=4, steps=12, seed=0)
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * schedule_factor(step, 12, s.warmup_steps, "linear")
        plain.set_step(step)
        batch = lab.collate([data[index] for index in order.micro_batch(step, 0)])
        optimizer.zero_grad()
        plain(**batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(list(names.values()), 1.0)
        optimizer.step()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, dict(plain.named_parameters())[name], rtol=1e-5, atol=1e-6)
    for model in (ours, fresh := lab.FakeModel(dropout=0, python_noise=False)):
        model.set_step(0)
    batch = lab.collate([data[index] for index in range(24)])
    assert ours(**batch)["ntp"] < 0.95 * fresh(**batch)["ntp"]


def test_accumulation_is_the_mean_of_equal_micro_batches_and_counts_steps(lab, tmp_path):
    models = {}
    for accumulate in (1, 2, 4):
        model = lab.FakeModel(dropout=0, python_noise=False)
        lab.run(tmp_path / str(accumulate), model=model, accumulate=accumulate, log_every=1)
        models[accumulate] = model
        assert model.steps == list(range(12))  # told once a step, in optimizer steps
        assert [line["iter"] for line in log(tmp_path / str(accumulate))] == list(range(1, 13))
    for accumulate in (2, 4):
        for p, q in zip(models[accumulate].parameters(), models[1].parameters()):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for one, other in zip(log(tmp_path / "1"), log(tmp_path / str(accumulate))):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_two_runs_in_one_process_are_equal_and_leave_nothing_behind(lab, tmp_path):
    kept = [len(kind._instance_dict) for kind in (MMLogger, MessageHub, Visualizer)]
    first, second = lab.run(tmp_path / "a"), lab.run(tmp_path / "b")
    assert lab.bits(first.last) == lab.bits(second.last)
    assert [len(kind._instance_dict) for kind in (MMLogger, MessageHub, Visualizer)] == kept
    other = lab.run(tmp_path / "c", seed=1)
    assert lab.bits(other.last)["model.safetensors"] != lab.bits(first.last)["model.safetensors"]


def test_workers_change_nothing(lab, tmp_path):
    plain, with_workers = lab.run(tmp_path / "a"), lab.run(tmp_path / "b", workers=2)
    assert lab.bits(plain.last) == lab.bits(with_workers.last)


def test_groups_of_the_data_set_come_in_one_batch(lab, tmp_path):
    seen = []

    class Watch(Hook):
        def before_micro_batch(self, runner, data_batch):
            seen.append([int(sample.id[1:]) for sample in data_batch["batch"].samples])

    lab.run(tmp_path, grouped=True, batch_size=3, hooks=[Watch()])
    assert all(len(ids) == 6 and all(a + 1 == b for a, b in zip(ids[::2], ids[1::2])) for ids in seen)
    data = lab.FakeData()
    del data.groups
    with pytest.raises(UserError, match="FakeData has no 'groups'"):
        lab.run(tmp_path / "b", data=data, grouped=True)


def test_bf16_computes_in_bf16_and_keeps_float32_weights(lab, tmp_path):
    made = lab.run(tmp_path, precision="bf16")
    assert set(made.model.dtypes) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in made.model.parameters())
    assert all(t.dtype == torch.float32 for t in load_file(made.last / "optimizer.safetensors").values())
    with pytest.raises(UserError, match=r"'student.first.weight' is bfloat16.*precision='bf16'"):
        lab.run(tmp_path / "b", model=lab.FakeModel().to(torch.bfloat16))


def test_frozen_parameters_stay_and_all_frozen_is_an_error(lab, tmp_path):
    model = lab.FakeModel()
    frozen = model.student.frozen.weight.clone()
    made = lab.run(tmp_path, model=model)
    assert torch.equal(model.student.frozen.weight, frozen)
    assert not any("frozen" in name for name in load_file(made.last / "optimizer.safetensors"))
    model.requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameters"):
        lab.run(tmp_path / "b", model=model)


def test_gradient_checkpointing_reaches_a_transformers_model_and_refuses_others(lab, tmp_path):
    from transformers import LlamaConfig, LlamaModel

    from laavit.engine.strategies import enable_gradient_checkpointing

    with pytest.raises(UserError, match="gradient_checkpointing"):
        lab.run(tmp_path, gradient_checkpointing=True)
    model = torch.nn.Module()
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 8,
    }
    model.student = torch.nn.ModuleDict({"backbone": LlamaModel(LlamaConfig(**sizes))})
    enable_gradient_checkpointing(model)
    assert all(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))


def test_it_is_quiet_and_logs_a_line_a_logged_step(lab, tmp_path, capfd, caplog):
    with caplog.at_level(logging.INFO, logger="laavit.engine"):
        lab.run(tmp_path)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    lines = [r.getMessage() for r in caplog.records if r.name == "laavit.engine"]
    assert len(lines) == 7
    assert lines[0].startswith("step 1/12  left ") and "ntp" in lines[0] and "gamma" in lines[0]


def test_the_bar_shows_all_figures_on_a_terminal(lab, tmp_path):
    import io

    from rich.console import Console

    from laavit.engine.hooks import ProgressHook

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200)
    lab.run(tmp_path, hooks=[ProgressHook(12, console)])
    assert "12/12" in screen.getvalue() and "gamma" in screen.getvalue() and "grad_norm" in screen.getvalue()


def test_the_engine_costs_less_than_two_milliseconds_a_step(lab, tmp_path):
    """Processor time of a step, less that of the same step written by hand."""
    marks = {}

    class Clock(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            marks[batch_idx] = time.process_time()

    lab.run(tmp_path, steps=300, checkpoint_every=0, log_every=10, hooks=[Clock()])
    model, data = lab.FakeModel(), lab.FakeData()
    optimizer = torch.optim.AdamW([p for _, p in model.trainable_parameters()], fused=True)
    by_hand = []
    for step in range(100):
        start = time.process_time()
        model.set_step(step)
        model(**lab.collate([data[index] for index in range(4)]))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        by_hand.append(time.process_time() - start)
    ours = [marks[step + 1] - marks[step] for step in range(100, 299)]
    assert statistics.median(ours) - statistics.median(by_hand) < 0.002


def test_reading_settings_does_not_import_the_runner():
    code = "import sys, laavit.engine; sys.exit('mmengine.runner' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
