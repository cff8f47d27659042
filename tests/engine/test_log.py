import json
import logging
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from processes import launch

from laavit.engine.hooks.gradient_norms import Rows, norm_of
from laavit.engine.hooks.wandb import check_wandb
from laavit.engine.throughput import Work, peak_flops
from laavit.registry import UserError


def log(work_dir):
    return [json.loads(line) for line in (work_dir / "log.jsonl").read_text().splitlines()]


class Slow(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        time.sleep(0.02)


def test_rates_are_counts_over_the_time_of_their_steps(lab, tmp_path):
    lab.run(tmp_path, hooks=[Slow()])
    for line in log(tmp_path):
        assert line["samples_per_second"] == pytest.approx(4 / line["step_seconds"], rel=0.01)
        assert line["samples_per_second"] < 4 / 0.02
        assert "tokens_per_second" not in line and "mfu" not in line  # no tokens, no GPU
        assert 0.05 < line["host_memory_gb"] < 64 and "memory_gb" not in line


def test_what_hooks_look_at_before_a_line_is_no_part_of_the_steps(lab, tmp_path):
    class Look(Hook):
        def before_log(self, runner, record):
            time.sleep(0.2)
            record["probe/ntp"] = 1.5

    lab.run(tmp_path, steps=4, log_every=1, hooks=[Look()])
    lines = log(tmp_path)
    assert all(line["probe/ntp"] == 1.5 for line in lines)
    assert all(line["step_seconds"] < 0.2 for line in lines)


def test_the_latest_figures_are_there_for_other_hooks(lab, tmp_path):
    seen = []

    class Read(Hook):
        priority = "LOWEST"

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            seen.append(dict(runner.figures))

    lab.run(tmp_path, steps=4, log_every=2, hooks=[Read()])
    lines = log(tmp_path)
    assert [figures["iter"] for figures in seen] == [1, 2, 2, 4]
    assert seen[-1] == lines[-1] and seen[2] == lines[1]


def test_gradient_norms_of_parts_are_logged(lab, tmp_path):
    lab.run(tmp_path)
    for line in log(tmp_path):  # the fake model has one part, its student
        assert line["grad_norm/student"] == pytest.approx(line["grad_norm"], rel=1e-5)


def test_two_processes_count_together(lab, tmp_path):
    def work(rank):
        lab.run(tmp_path, hooks=[Slow()])

    assert launch(work) == [0, 0]
    for line in log(tmp_path):
        assert line["samples_per_second"] == pytest.approx(4 / line["step_seconds"], rel=0.01)


def test_mfu_is_flops_over_the_peak_of_all_devices():
    work = Work(None, 1e12)
    work.samples, work.tokens, work.flops = 8, 100, 5e11
    found = work.rates([16, 200, 1e12], seconds=2.0, world=2)  # of both processes
    assert found == {"samples_per_second": 8.0, "tokens_per_second": 100.0, "mfu": 0.25}
    assert "mfu" not in Work(None, None).rates([16, 200, 0], 2.0, 2)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 366e12),
        ("NVIDIA L40", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce GT 710", None),
    ],
)
def test_peaks_are_found_by_the_devices_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == peak
    assert peak_flops(torch.device("cuda"), "fp32") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_norms_of_plain_and_sharded_gradients(lab, tmp_path):
    """Two processes, an odd table whose last shard is shorter, and one row only: a shard is empty."""
    torch.manual_seed(0)
    table, single, plain = torch.randn(5, 3), torch.randn(1, 4), torch.randn(7)
    rows = [1, 4]

    def work(rank):
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        sharded = [distribute_tensor(value, mesh, [Shard(0)]) for value in (table, single)]
        assert len(sharded[1].to_local()) == 1 - rank
        whole = torch.stack([value.norm() for value in (table, single, plain)]).norm()
        torch.testing.assert_close(norm_of([plain, *sharded]), whole)
        parameter = torch.nn.Parameter(sharded[0])
        parameter.grad = sharded[0]
        torch.testing.assert_close(Rows(parameter, rows).norm(), table[rows].norm())
        dist.destroy_process_group()

    assert launch(work) == [0, 0]


def test_wandb_gets_every_figure_at_its_step_and_a_resumed_run_goes_on(lab, tmp_path, monkeypatch):
    inits, logged, finished = [], [], []
    run = SimpleNamespace(log=lambda figures, step: logged.append((step, figures)), finish=lambda: finished.append(1))
    fake = SimpleNamespace(init=lambda **given: (inits.append(given), run)[1], __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    lab.run(tmp_path, wandb="looking", steps=4)
    lab.run(tmp_path, wandb="looking", steps=8, resume=True)
    assert [given["project"] for given in inits] == ["looking"] * 2 and inits[0]["id"] == inits[1]["id"]
    assert inits[0]["config"] == {"title": "fake"} and inits[0]["dir"] == str(tmp_path)
    assert [step for step, _ in logged] == [1, 2, 4, 6, 8] and len(finished) == 2
    assert logged[0][1]["ntp"] == log(tmp_path)[0]["ntp"] and "iter" not in logged[0][1]


def test_wandb_that_refuses_is_told_in_a_sentence(lab, tmp_path, monkeypatch):
    class Refused(Exception):
        pass

    def init(**given):
        raise Refused("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Refused, __spec__=object()))
    with pytest.raises(UserError, match=r"train.wandb: .*No API key configured. Use `wandb login`.*WANDB_MODE=offline"):
        lab.run(tmp_path, wandb="looking")


def test_wandb_that_is_not_installed_is_refused_in_a_sentence(lab, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("laavit.engine.hooks.wandb.find_spec", lambda name: None)
    with pytest.raises(UserError, match="package wandb is not installed: pip install wandb"):
        check_wandb("looking")
    check_wandb(None)
    with pytest.raises(UserError, match="'looking'"):
        lab.run(tmp_path, wandb="looking")
    assert not (tmp_path / "log.jsonl").exists() or log(tmp_path) == []


def test_the_terminals_line_leaves_out_what_is_for_files(lab, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="laavit.engine"):
        lab.run(tmp_path)
    line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("step 1/12"))
    assert "samples_per_second" in line and "grad_norm " in line
    assert "grad_norm/" not in line and "host_memory" not in line
