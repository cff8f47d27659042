"""Workers: many cells in one process with the same bits as alone, failures apart, kills resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from laavit.cli import main as cli
from laavit.registry import UserError
from laavit.sweeps import cell as cells
from laavit.sweeps import local, worker
from laavit.sweeps.plan import Cell, Plan, plan_of
from laavit.sweeps.settings import Questions, read_sweep
from laavit.sweeps.status import Status, failures, write_failures

#: a worker without torch: names that begin with "dies" end the process, the first time or always; "bad" ones fail
FAKE = """
import json, os, pathlib, sys, time
out = pathlib.Path(sys.argv[1]).parent
for line in sys.stdin:
    name = line.strip()
    with (out / "order.txt").open("a") as file:
        file.write(f"{os.getpid()} {name} {sys.argv[2]} {os.environ['OMP_NUM_THREADS']}\\n")
    if name == "dies" or (name == "once" and not (out / "once").exists()):
        (out / "once").write_text("")
        os.kill(os.getpid(), 9)
    time.sleep(0.3 if name == "slow" else 0)
    event = {"cell": name, "event": "failed" if name == "bad" else "done", "error": "it is bad", "seconds": 0.1}
    print(json.dumps(event), flush=True)
"""


def fake_plan(out: Path, names: Sequence[str]) -> Plan:
    return Plan("fake", out, tuple(Cell(n, n, n, 0, None, "m", ("on",)) for n in names), Questions(tasks=("t",)))


def run_fake(out: Path, monkeypatch: pytest.MonkeyPatch, names: Sequence[str], **more: Any) -> tuple[Status, list[Any]]:
    """Run cells on fake workers; the status, and who ran what: (process, cell, cores, threads)."""
    (out / "fake.py").write_text(FAKE)
    monkeypatch.setattr(local, "PROGRAM", (sys.executable, str(out / "fake.py")))
    plan = fake_plan(out, names)
    plan.write()
    with Status(plan, plan.cells) as status:
        local.run_local(plan, plan.cells, status, **{"workers": 1, "threads": None, "deadline": None, **more})
    order = out / "order.txt"
    return status, [line.split() for line in order.read_text().splitlines()] if order.is_file() else []


def test_a_failure_ends_neither_worker_nor_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, order = run_fake(tmp_path, monkeypatch, ["a", "bad", "b"])
    assert [name for _, name, _, _ in order] == ["a", "bad", "b"] and len({process for process, *_ in order}) == 1
    assert status.done == ["a", "b"] and status.failed == {"bad": "it is bad"}
    plan = fake_plan(tmp_path, ["a", "bad", "b"])
    (plan.folder(plan.cell("bad"))).mkdir(parents=True)
    (plan.folder(plan.cell("bad")) / "log.txt").write_text("one\n 10%\r100%\nlast words\n")
    assert write_failures(plan) == {"bad": "it is bad"}
    assert "## bad\n\nit is bad\n\n```text\none\n100%\nlast words\n```" in (tmp_path / "failures.md").read_text()


def test_a_dead_worker_is_replaced_and_its_cell_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, order = run_fake(tmp_path, monkeypatch, ["once", "dies", "a"])
    assert [name for _, name, _, _ in order] == ["once", "dies", "a", "once", "dies"]
    assert sorted(status.done) == ["a", "once"] and "ended with -9 (killed" in status.failed["dies"]
    events = [json.loads(line) for line in (tmp_path / "status.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events if e["cell"] == "dies"] == ["started", "died", "started", "failed"]
    assert list(failures(fake_plan(tmp_path, ["once", "dies", "a"]))) == ["dies"]


def test_workers_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: [4, 5, 6, 7])
    assert local.shares(2, None) == [[4, 5], [6, 7]] and local.shares(3, 1) == [[4], [5], [6]]
    assert local.shares(8, None)[5] == [5]
    status, order = run_fake(tmp_path, monkeypatch, ["slow", "a", "b", "c"], workers=2, threads=1)
    assert sorted(status.done) == ["a", "b", "c", "slow"] and len({process for process, *_ in order}) == 2
    assert {(cores, threads) for _, _, cores, threads in order} == {("4", "1"), ("5", "1")}


def test_after_the_deadline_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, order = run_fake(tmp_path, monkeypatch, ["slow", "a"], deadline=time.monotonic() + 0.2)
    assert [name for _, name, _, _ in order] == ["slow"] and status.done == ["slow"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("no"), "no"),
        (SystemExit(3), "SystemExit: 3"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
    ],
)
def test_whatever_a_cell_raises_is_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException, said: str
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(cells, "run_cell", fail)
    assert worker.attempt(None, SimpleNamespace(name="x"), print, print) == {"event": "failed", "error": said}
    assert str(error) in caplog.text


def test_threads_environment_and_generators_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for _ in range(2):
        with cells.isolated():
            drawn.append(torch.rand(2).tolist())
            torch.set_num_threads(torch.get_num_threads() + 1)
            os.environ["LAAVIT_LEFT"] = "x"
    assert drawn[0] == drawn[1] and "LAAVIT_LEFT" not in os.environ
    before = torch.get_num_threads()
    with cells.isolated():
        torch.set_num_threads(before + 2)
    assert torch.get_num_threads() == before


def test_what_is_finished_is_not_done_again(lab_folder: Path, tmp_path: Path) -> None:
    plan = plan_of(read_sweep(lab_folder / "sweep.py"), lab_folder, tmp_path)
    cell, seen = plan.cell("latents-s0"), []

    def call(words: Sequence[str]) -> None:
        seen.append(words[0])
        folder = plan.folder(cell)
        if words[0] == "train":
            (folder / "checkpoints/iter_000003").mkdir(parents=True)
            (folder / "checkpoints/iter_000003/state.json").write_text('{"files": {}}')
        if words[0] == "export":
            (folder / "export").mkdir()
            (folder / "export/laavit.json").write_text("{}")
        if words[0] == "eval" and len(seen) < 5:
            raise UserError("stopped")

    for _ in range(2):
        with pytest.raises(UserError, match="stopped"):
            cells.run_cell(plan, cell, call)
    assert seen == ["train", "export", "eval", "eval"]
    assert not (plan.folder(cell) / "checkpoints").exists()  # keep = "export"
    other = plan_of(read_sweep(lab_folder / "sweep.py", {"overrides": {"train.lr": 0.1}}), lab_folder, tmp_path)
    with pytest.raises(UserError, match=r"is of another sweep: its recipe was another one \(train\.lr\); --redo"):
        cells.run_cell(other, other.cell("latents-s0"), call)
    cells.redo(other, other.cell("latents-s0"))
    assert not plan.folder(cell).exists()


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / "cells" / name / "export/model.safetensors")


@pytest.mark.slow
def test_second_in_a_worker_or_killed_and_resumed_the_bits_are_the_same(lab_folder: Path, tmp_path: Path) -> None:
    """One worker: naive, one that diverges, latents. Then latents alone, killed after a checkpoint, and resumed."""
    text = (lab_folder / "sweep.py").read_text()
    text = text.replace("    naive=None,", '    naive=None,\n    nan=dict(overrides={"train.lr": 1e30}),')
    file = lab_folder / "with_nan.py"
    file.write_text(text)
    first, second = tmp_path / "first", tmp_path / "second"
    words = ["sweep", str(file), "--workers", "1", "--threads", "1", "--seeds", "0"]
    assert cli([*words, "--out", str(first), "--only", "naive", "nan", "latents"]) == 1
    assert "the loss is nan" in (first / "failures.md").read_text()
    assert "| latents, latents off |" in (first / "table.md").read_text()
    assert (first / "cells/latents-s0/eval/microlab_test-latents-off/summary.json").is_file()

    alone = [*words, "--out", str(second), "--only", "latents", "--evaluate.tasks", "[]"]
    alone += ["--override", "train.checkpoint_every=1"]
    process = subprocess.Popen([sys.executable, "-m", "laavit.cli", *alone], stderr=subprocess.DEVNULL)
    waited, checkpoint = time.monotonic(), second / "cells/latents-s0/checkpoints/iter_000001"
    while not checkpoint.exists() and time.monotonic() - waited < 600:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert cli(alone) == 0
    log = (second / "cells/latents-s0/log.txt").read_text()
    assert "resumed at step" in log
    for name, tensor in weights(first, "latents-s0").items():
        assert torch.equal(weights(second, "latents-s0")[name], tensor), name
    assert not torch.equal(*(next(iter(weights(first, name).values()))[:2] for name in ("latents-s0", "naive-s0")))
    assert cli(alone) == 0 and (second / "cells/latents-s0/log.txt").read_text() == log
