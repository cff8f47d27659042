"""A sweep's record holds what its table needs: the same rows, and the study's figures computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from laavit.commands.study import marks, placed
from laavit.evaluation.records import write_records
from laavit.files import write_json
from laavit.registry import UserError
from laavit.sweeps.plan import Cell, Plan
from laavit.sweeps.record import read_rows, record_of, write_record
from laavit.sweeps.settings import Questions
from laavit.sweeps.study import compared, draw, study_table
from laavit.sweeps.table import rows_of

QUESTIONS = [(str(i), ("colour", "shape")[i % 2]) for i in range(20)]
#: (arm, mode) -> for each seed how many of the 20, from the first on, are right
RIGHT = {("naive", "on"): [10, 12], ("latents", "on"): [14, 16], ("latents", "off"): [14, 13]}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two arms, three seeds planned, two of them there."""
    cells = [
        Cell(f"{arm}-s{seed}", arm, arm.title(), seed, None, str(tmp_path), modes)
        for seed in range(3)
        for arm, modes in (("naive", ("on",)), ("latents", ("on", "off")))
    ]
    plan = Plan("small", tmp_path, tuple(cells), Questions(("t",)), reference="naive", title="A small study")
    for (arm, mode), counts in RIGHT.items():
        for seed, count in enumerate(counts):
            cell = next(cell for cell in cells if cell.arm == arm and cell.seed == seed)
            write_answers(plan.evaluation(cell, mode), mode, [place < count for place in range(20)])
    return plan


def write_answers(folder: Path, mode: str, right: list[bool]) -> None:
    records = [
        {"task": "t", "id": name, "kind": kind, "prediction": "", "target": "x", "correct": correct}
        for (name, kind), correct in zip(QUESTIONS, right, strict=True)
    ]
    folder.mkdir(parents=True)
    write_records(folder / "records.jsonl", records)
    write_json(folder / "summary.json", {"latents": mode, "weights_sha256": f"w-{folder.parent.parent.name}"})


def test_a_record_is_its_rows(plan: Plan, tmp_path: Path) -> None:
    file = write_record(plan, tmp_path / "kept" / "small.json")
    head, rows = read_rows(file)
    assert head == {"schema": 1, "name": "small", "title": "A small study", "reference": "naive"}
    for found, expected in zip(rows, rows_of(plan), strict=True):
        own = ("label", "arm", "mode", "planned", "seeded")
        assert [getattr(found, name) for name in own] == [getattr(expected, name) for name in own]
        assert found.seeds.keys() == expected.seeds.keys()
        for seed, evaluation in expected.seeds.items():
            assert found.seeds[seed].records == evaluation.records
            assert found.seeds[seed].weights == evaluation.weights
    assert json.loads(file.read_text())["rows"][0]["right"] == "ffc000"  # ten ones, ten noughts, four of padding


def test_other_questions_and_other_files_are_refused(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record of a sweep at"):
        read_rows(tmp_path / "none.json")
    write_json(tmp_path / "old.json", {"schema": 0})
    with pytest.raises(UserError, match="of schema 1, but of 0"):
        read_rows(tmp_path / "old.json")
    file = plan.evaluation(plan.cells[0], "on") / "records.jsonl"
    file.write_text(file.read_text().replace('"id": "3"', '"id": "33"'))
    with pytest.raises(UserError, match="answers other questions"):
        record_of(plan)


def test_the_studys_figures_by_hand(plan: Plan) -> None:
    columns, found = compared(rows_of(plan), ["naive"])
    assert [title for title, _, _ in columns] == ["all", "colour", "shape"]
    naive, latents = found
    assert naive.gains == [None] and naive.masked is None and latents.masked is not None
    assert naive.shares[0].mean == pytest.approx((10 + 12) / 40)
    assert latents.shares[1].mean == pytest.approx((7 + 8) / 20)
    gain = latents.gains[0]
    assert gain is not None
    assert gain.mean == pytest.approx(4 / 20) and gain.sd == pytest.approx(0.0)  # four more in both seeds
    assert gain.low < 4 / 20 < gain.high
    assert latents.masked.mean == pytest.approx((0 - 3) / 40)
    assert latents.masked.sd == pytest.approx(np.std([0, -3 / 20], ddof=1))
    with pytest.raises(UserError, match="no arm 'naiv'"):
        compared(rows_of(plan), ["naiv"])


def test_table_and_picture(plan: Plan, tmp_path: Path) -> None:
    rows = rows_of(plan)
    text = study_table("A small study", rows, ["naive"]).to_markdown()
    line = next(line for line in text.splitlines() if line.startswith("| Latents"))
    assert "| 2 of 3 |" in line and "| 75.0 [" in line and "| +20.0 [" in line and "| -7.5 [" in line
    file = draw("A small study", rows, "naive", tmp_path / "a" / "small.png")
    assert np.asarray(Image.open(file)).std() > 0


def test_results_stand_between_their_marks() -> None:
    begin, end = marks("small")
    readme = f"before\n{begin}\nold\n{end}\nafter\n"
    assert placed(readme, "small", "new\n") == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    with pytest.raises(UserError, match="lacks the marks"):
        placed("nothing", "small", "new")
