"""The table equals what is worked out by hand from the records."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from laavit.evaluation.statistics import pooled
from laavit.reports.runs import Evaluation, Record
from laavit.sweeps.plan import Cell, Plan
from laavit.sweeps.settings import Questions
from laavit.sweeps.table import Row, _share, by_seed, difference, matrix, rows_of, write_table

#: (arm, seed, mode) -> which of the four questions (two of each kind) are right
ANSWERS = {
    ("base", 0, "on"): (1, 0, 0, 0),
    ("naive", 0, "on"): (1, 1, 0, 0),
    ("naive", 1, "on"): (1, 0, 0, 0),
    ("ours", 0, "on"): (1, 1, 1, 0),
    ("ours", 1, "on"): (1, 1, 0, 1),
    ("ours", 0, "off"): (1, 1, 0, 0),
    ("control", 1, "on"): (0, 0, 0, 1),
}


@pytest.fixture
def swept(tmp_path: Path) -> Plan:
    cells = (
        Cell("base-s0", "base", "Base", 0, None, "m", ("on",)),
        *(Cell(f"naive-s{s}", "naive", "Naive", s, {}, None, ("on",)) for s in (0, 1)),
        *(Cell(f"ours-s{s}", "ours", "Ours", s, {}, None, ("on", "off")) for s in (0, 1)),
        Cell("control-s1", "control", "Control", 1, {}, None, ("on",)),
        Cell("none-s0", "none", "Not run", 0, {}, None, ("on",)),
    )
    plan = Plan("t", tmp_path, cells, Questions(tasks=("quiz",)), reference="naive", title="Quiz")
    for (arm, seed, mode), right in ANSWERS.items():
        folder = plan.evaluation(plan.cell(f"{arm}-s{seed}"), mode)
        folder.mkdir(parents=True)
        rows = [dict(task="quiz", id=f"q{i}", correct=bool(k), kind="ab"[i // 2]) for i, k in enumerate(right)]
        (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entry = {"n": 4, "accuracy": sum(right) / 4}
        summary = {"latents": mode, "weights_sha256": "0", "tasks": {"quiz": entry}}
        (folder / "summary.json").write_text(json.dumps(summary))
    return plan


def test_figures_are_those_of_the_records(swept: Plan) -> None:
    file = write_table(swept)
    assert file is not None
    rows = {
        (r["arm"], r["latents"], r["column"], r["what"]): r for r in csv.DictReader((swept.out / "table.csv").open())
    }
    means = {key[:3]: float(row["mean"]) for key, row in rows.items() if key[3] == "accuracy"}
    assert means["base", "on", "all questions"] == 0.25 and means["naive", "on", "all questions"] == pytest.approx(
        (0.5 + 0.25) / 2
    )
    assert means["ours", "on", "all questions"] == 0.75 and means["ours", "off", "all questions"] == 0.5
    assert means["ours", "on", "b"] == 0.5 and means["naive", "on", "a"] == 0.75
    gains = {key[:2]: row for key, row in rows.items() if key[3] == "difference"}
    assert float(gains["ours", "on"]["mean"]) == pytest.approx(0.375)  # (0.25 + 0.5) / 2
    # seed 0 alone is there with latents off, and is compared with seed 0; the base with both seeds
    assert float(gains["ours", "off"]["mean"]) == 0.0 and gains["ours", "off"]["seeds"] == "1+1"
    assert float(gains["base", "on"]["mean"]) == pytest.approx(-0.125) and gains["base", "on"]["seeds"] == "1+2"
    # a control that was trained with seed 1 alone is compared with seed 1
    assert float(gains["control", "on"]["mean"]) == 0.0 and gains["control", "on"]["seeds"] == "1+1"
    assert all(float(row["low"]) <= float(row["mean"]) <= float(row["high"]) for row in rows.values())
    assert ("naive", "on") not in gains


def test_rows_say_what_is_missing(swept: Plan) -> None:
    assert write_table(swept) is not None
    lines = (swept.out / "table.md").read_text().splitlines()
    body = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    assert list(body)[2:] == ["Base", "Naive", "Ours", "Ours, latents off", "Control", "Not run"]
    assert body["Ours, latents off"].endswith("| 1 of 2 |") and body["Not run"].endswith("| 0 of 1 |")
    assert body["Ours"].startswith("| Ours | 75.0 [") and "+37.5" in body["Ours"]
    assert "n = 4 questions" in "".join(lines)
    assert (swept.out / "table.html").read_text().count("<tr>") == 7
    assert r"Ours & 75.0 {\scriptsize [" in (swept.out / "table.tex").read_text()


def test_a_reference_that_hangs_on_no_seed_stands_beside_all_runs(swept: Plan) -> None:
    rows = {(row.arm, row.mode): row for row in rows_of(swept)}
    found = difference(rows["ours", "on"], rows["base", "on"], ("all", None, None))
    assert found is not None and found.mean == pytest.approx(0.75 - 0.25) and found.seeds == (2, 1)


def test_nothing_evaluated_is_no_table(tmp_path: Path) -> None:
    plan = Plan("t", tmp_path, (Cell("a-s0", "a", "A", 0, None, "m", ("on",)),), Questions(tasks=("quiz",)))
    assert write_table(plan) is None and not (tmp_path / "table.md").exists()


def test_a_small_share_of_two_seeds_stays_within_its_bounds_and_seeds_are_compared_one_by_one() -> None:
    def row(arm: str, *right: int) -> Row:
        found = {seed: Evaluation("e", "on", "", records(count), "", "") for seed, count in enumerate(right)}
        return Row(arm, arm, "on", found, len(right))

    def records(right: int) -> tuple[Record, ...]:
        return tuple(Record("t", str(i), i < right) for i in range(10))

    ours, theirs = row("ours", 9, 4, 1), row("theirs", 7, 5)
    cell = _share(pooled(matrix(ours.answers(("all", None, None)))), "")
    assert cell.low == 0.0 and cell.high == 1.0 and cell.detail == "[0.0, 100.0]"
    assert by_seed(ours, theirs, ("all", None, None)) == pytest.approx([0.2, -0.1])
