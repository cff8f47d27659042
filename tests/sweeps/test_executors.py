"""Runs that are launched: under torchrun, and as jobs of a SLURM array; what comes before them; the zoo's sweeps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from laavit.cli import main as cli
from laavit.paths import project_data
from laavit.registry import UserError
from laavit.sweeps import launch
from laavit.sweeps.before import expanded, missing, prepare
from laavit.sweeps.plan import Cell, Plan, plan_of
from laavit.sweeps.settings import Command, Questions, Sweep, read_arms, read_sweep
from laavit.sweeps.slurm import write_array
from laavit.sweeps.status import Status

ZOO = project_data("model_zoo")


def model_plan(out: Path, names: tuple[str, ...] = ("a", "b")) -> Plan:
    cells = tuple(Cell(f"{name}-s{seed}", name, name, seed, None, "m", ("on",)) for name in names for seed in (0, 1))
    return Plan("jobs", out, cells, Questions(tasks=("quiz",)))


def test_training_and_answering_are_split() -> None:
    split = launch.command(("train", "x", "--resume"), 2)
    assert split[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert split[6:] == ["-m", "laavit.cli", "train", "x", "--resume"]
    assert launch.command(("eval", "x"), 2)[6:] == ["-m", "laavit.cli", "eval", "x"]
    for words, processes in ((("train", "x"), 1), (("eval", "x"), 1), (("export", "x"), 2)):
        assert launch.command(words, processes) == [sys.executable, "-m", "laavit.cli", *words]


def test_a_failed_stage_is_told_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; print('started'); sys.stderr.write('error: no room\\n'); sys.exit(2)"
    monkeypatch.setattr(launch, "command", lambda words, processes: [sys.executable, "-c", program])
    plan = model_plan(tmp_path)
    with Status(plan, plan.cells[:2]) as status:
        launch.run_in_turn(plan, plan.cells[:2], status, 1, None)
    assert status.failed == dict.fromkeys(("a-s0", "a-s1"), "'laavit eval' ended with 2 no room")
    assert "started" in (plan.folder(plan.cells[0]) / "log.txt").read_text()


def test_an_array_runs_the_cells_of_its_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own shell is run, with a stand-in for Python that writes down its words."""
    echo = tmp_path / "python"
    echo.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/words.txt\n')
    echo.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(echo))
    plan = model_plan(tmp_path / "out put")
    options = {"gres": "gpu:4", "time": "1:00:00", "exclusive": True, "max": 2}
    said = write_array(plan, plan.cells[1:], options, 4, ["my sweep.py"], before=True)
    assert said.splitlines() == [
        f"first=$(sbatch --parsable '{plan.out}/slurm/before.sh')",
        f"sbatch --dependency=afterok:$first '{plan.out}/slurm/array.sh'",
        "laavit sweep 'my sweep.py' --table  # when they are through",
    ]
    text = (plan.out / "slurm/array.sh").read_text()
    for line in ("--array=0-2%2", "--gres=gpu:4", "--exclusive", "--job-name=jobs"):
        assert f"#SBATCH {line}\n" in text
    assert text.index("#SBATCH --exclusive") < text.index("set -euo pipefail")
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "1"}
    subprocess.run(["bash", str(plan.out / "slurm/array.sh")], check=True, env=environment)
    expected = ["-m", "laavit.cli", "sweep", f"{plan.out}/sweep.json", "--cell", "b-s0", "--nproc-per-node", "4"]
    assert (tmp_path / "words.txt").read_text().splitlines() == expected
    subprocess.run(["bash", str(plan.out / "slurm/before.sh")], check=True)
    assert (tmp_path / "words.txt").read_text().splitlines() == [
        "-m",
        "laavit.cli",
        "sweep",
        "my sweep.py",
        "--only-before",
    ]
    with pytest.raises(UserError, match=r"slurm\.array: the sweep writes it itself"):
        write_array(plan, plan.cells, {"array": "0-9"}, 1, ["x"], before=False)


@pytest.mark.slow
def test_two_processes_train_a_cell_of_an_array(
    lab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--executor slurm writes the plan; its job, with two processes (gloo), leaves the same files as any other run."""
    out = tmp_path / "out"
    words = ["sweep", str(lab_folder / "sweep.py"), "--out", str(out), "--only", "naive", "--seeds", "0"]
    assert cli([*words, "--executor", "slurm", "--nproc-per-node", "2"]) == 0
    assert capsys.readouterr().out.startswith("sbatch ")
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "0", "OMP_NUM_THREADS": "1"}
    subprocess.run(["bash", str(out / "slurm/array.sh")], check=True, env=environment, timeout=600)
    assert '"processes": 2' in re.sub(r"\s+", " ", (out / "cells/naive-s0/environment.json").read_text())
    assert cli([*words, "--table"]) == 0 and (out / "table.md").is_file()
    assert cli(["sweep", str(out / "sweep.json"), "--cell", "naive-s0"]) == 0  # finished: nothing is done


def test_commands_before_run_once_for_those_who_need_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = model_plan(tmp_path / "out")
    write = "python -c \"open('{}', 'a').write('x')\""
    sweep = Sweep(
        "s",
        before=(
            write.format("always"),
            [
                {"run": write.format("{seed}.txt"), "creates": "{seed}.txt"},
                {"run": write.format("only_c"), "arms": ["c"]},
            ],
        ),
    )
    assert [c.run for c in expanded([Command("x {seed}", arms=("b",))], plan.cells[:3])] == ["x 0"]
    for _ in range(2):
        prepare(sweep.stages, plan.cells, plan.out, 2, 1)
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert found == {"always": "x", "0.txt": "x", "1.txt": "x"} and not missing(sweep.stages, plan.cells, plan.out)
    stages = [[Command("python -c \"print('why'); exit(3)\"")]]
    with pytest.raises(UserError, match=r"before: .* ended with 3: .*why"):
        prepare(stages, plan.cells, plan.out, 1, 1)
    with pytest.raises(UserError, match="ended well, and there is no 'nothing'"):
        prepare([[Command("python -c 0", "nothing")]], plan.cells, plan.out, 1, 1)


@pytest.mark.parametrize("file", sorted(ZOO.glob("*/sweeps/*.py")), ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_the_sweeps_of_the_zoo_resolve(file: Path, tmp_path: Path) -> None:
    sweep = read_sweep(file)
    plan = plan_of(sweep, file.parent, tmp_path)
    names = {cell.arm for cell in plan.cells}
    assert plan.reference in names and all(cell.latents for cell in plan.cells)
    if "_base_" not in file.read_text(encoding="utf-8"):  # what is derived may leave arms out
        named = {arm for stage in sweep.stages for command in stage for arm in command.arms}
        assert not named - {*read_arms(sweep, file.parent)}
    if file.stem == "table_a2":
        assert len(names) == 15
    if file.parts[-3:] == ("microlab", "sweeps", "table3.py"):
        assert len(plan.cells) == 16 * 5
