"""`laavit study` in pieces: what is not there yet is said, and is no mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from laavit.commands import evaluate, study
from laavit.sweeps.plan import Cell, Plan
from laavit.sweeps.settings import Questions


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
