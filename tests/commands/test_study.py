"""``laavit study``: runs a sweep, keeps its record beside the recipes, and shows it in their README; in pieces, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from laavit.cli import run
from laavit.commands import evaluate, study
from laavit.microlab.dataset import DatasetSettings, write_dataset
from laavit.sweeps.plan import Cell, Plan
from laavit.sweeps.settings import Questions

README = "# Mine\n\n<!-- laavit study: small -->\n<!-- laavit study: small end -->\n\nafter\n"


@pytest.fixture
def zoo(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model zoo whose only sweep asks one untrained model twice."""
    monkeypatch.chdir(tmp_path)
    write_dataset("data", DatasetSettings(train=1, val=1, test=1))
    folder = tmp_path / "zoo" / "microlab"
    (folder / "sweeps").mkdir(parents=True)
    (folder / "README.md").write_text(README)
    (folder / "sweeps" / "small.py").write_text(
        f'name = "small"\ntitle = "Small"\nout = "out"\nreference = "a"\n'
        f"arms = dict(a=dict(model={str(tiny_folder)!r}), b=dict(model={str(tiny_folder)!r}))\n"
        'evaluate = dict(tasks=["microlab_test"], data_root="data/eval", batch_size=6)\n'
    )
    monkeypatch.setattr(study, "project_data", lambda name: tmp_path / "zoo")
    monkeypatch.setattr(study, "SWEEPS", {"small": ("a",)})
    monkeypatch.setattr(study, "INTERVENED", {})
    return folder


def test_a_study_is_run_kept_shown_and_drawn_again(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("study", ["small", "--write", "--workers", "1"]) == 0, capsys.readouterr().err
    kept = json.loads((zoo / "study" / "small.json").read_text())
    assert [row["arm"] for row in kept["rows"]] == ["a", "b"] and len(kept["questions"]) == 6
    shown = (zoo / "README.md").read_text()
    assert "| b | 1 |" in shown and "(study/small.png)" in shown and shown.endswith("small end -->\n\nafter\n")
    (zoo / "study" / "small.png").unlink()
    (zoo / "README.md").write_text(README)
    assert run("study", ["--render"]) == 0
    assert (zoo / "README.md").read_text() == shown and (zoo / "study" / "small.png").is_file()


def test_mistakes_are_named(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("study", ["smal"]) == 2
    assert "no sweep is called 'smal'; allowed: small (did you mean 'small'?)" in capsys.readouterr().err
    assert run("study", ["--render"]) == 2
    assert "there is no record of a sweep" in capsys.readouterr().err


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Table 3 with its first two arms answered, and not the second reference."""
    monkeypatch.setattr(study, "OUT", tmp_path / "study")
    arms = ("base", "naive_sft", "lavit")
    cells = tuple(Cell(f"{arm}-s0", arm, arm, 0, None, str(tmp_path), ("on",)) for arm in arms)
    plan = Plan("t", tmp_path / "table3", cells, Questions(("t",)), title="T")
    for cell in cells[:2]:
        answer(plan, cell)
    return plan


def answer(plan: Plan, cell: Cell) -> None:
    folder = plan.evaluation(cell, "on")
    folder.mkdir(parents=True)
    rows = [{"task": "t", "id": str(i), "correct": i % 2 == 0, "kind": "k"} for i in range(8)]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"latents": "on"}))


def test_a_stop_before_the_references_are_there_is_no_mistake(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "run", lambda *words: (plan, 0))
    assert study.lacking(plan, "table3") == ["lavit"]
    assert study.main(["table3", "--max-minutes", "5"]) == 0
    assert not (study.OUT / "table3.md").exists()


def test_no_sweep_is_begun_when_the_time_is_over(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def run(name: str, *rest: Any) -> tuple[Plan, int]:
        begun.append(name)
        return plan, 0

    monkeypatch.setattr(study, "run", run)
    assert study.main(["--max-minutes", "0"]) == 0
    assert begun == []


def test_interventions_stand_beside_the_evaluations(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """In eval/ they would be a second evaluation of the same questions, which tables refuse."""

    def asked(words: list[str]) -> int:
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True)
        (out / "interventions.json").write_text('{"effects": {}}')
        return 0

    answer(plan, plan.cells[2])
    monkeypatch.setattr(evaluate, "main", asked)
    study.intervene(plan, "table3", plan.out / "table3.json")
    assert (plan.out / "table3-lavit-interventions.json").is_file()
    assert [path.name for path in (plan.folder(plan.cells[2]) / "eval").iterdir()] == ["t-latents-on"]
