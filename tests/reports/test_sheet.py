"""A table filled with runs: every cell has a source, and every figure follows from the records."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from laavit.cli import main
from laavit.evaluation.records import write_records
from laavit.evaluation.statistics import mcnemar, paired_bootstrap, wilson
from laavit.registry import UserError
from laavit.reports.matching import match
from laavit.reports.runs import Record, load_runs
from laavit.reports.sheet import fill, gain_table, main_table, sheet_tables, units
from laavit.reports.spec import Column, load_sheet
from laavit.reports.table import render

TABLE = """
title: A table
source: LaViT (arXiv 2601.10129), Table 3
columns:
  - {name: MMVP, task: mmvp, n: 300}
  - {name: pairs, task: mmvp, score: pair}
  - {name: V*, task: vstar_bench_direct_attributes, also: [{task: vstar_bench, kind: direct_attributes}], n: 115}
  - {name: RelRefl, task: blink_relative_reflectance, n: 134}
rows:
  - {name: lavit, label: LaViT, params: 3B, paper: ["67.33", ~, "82.61", "45.52"], recipe: lavit,
     where: {latents.count: 4}}
  - {name: blind, label: masked, paper: ["64.33", ~, ~, "81.12"], recipe: lavit,
     where: {latents.count: 4}, latents: off,
     marks: {RelRefl: as printed}}
  - {name: hard, label: hard & fast, paper: ["59.33", ~, ~, ~], recipe: [hard_gate]}
reference: lavit
"""  # fmt: skip


def write_run(
    folder: Path, right: Sequence[bool], title: str = "lavit", latents: str = "on", count: int = 4, **summary: object
) -> Path:
    """MMVP's 300 questions (ids 1 to 300, pairs of two) and 115 + 5 of V*; ``right`` says which of MMVP."""
    records = [
        {"task": "mmvp", "id": str(i + 1), "prediction": "a", "target": "a", "correct": bool(ok)}
        | {"groups": {"pair": str(i // 2)}}
        for i, ok in enumerate(right)
    ]
    for i in range(120):
        kind = "direct_attributes" if i < 115 else "relative_position"
        record = {"task": "vstar_bench", "id": str(i), "prediction": "a", "target": "a", "correct": i < 95}
        records.append({**record, "kind": kind})
    place = folder / "eval" / f"all-{latents}{summary.get('protocol', '')}"
    place.mkdir(parents=True)
    write_records(place / "records.jsonl", records)
    (place / "summary.json").write_text(json.dumps({"latents": latents, **summary}))
    recipe = {"seed": hash(folder.name) % 100, "title": title, "latents": {"type": "L", "count": count}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


@pytest.fixture
def sheet(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(TABLE, encoding="utf-8")
    return load_sheet(tmp_path / "mine.yaml")


def answers(share: float, seed: int) -> list[bool]:
    rng = np.random.default_rng(seed)
    return (np.random.default_rng(0).random(300) + rng.normal(0, 0.1, 300) < share).tolist()


def test_ours_paper_difference_and_interval(sheet, tmp_path: Path) -> None:
    right = [i < 202 for i in range(300)]  # the paper's own count
    run = write_run(tmp_path / "lavit", right)
    results = fill(sheet, [run])
    table = main_table(sheet, results)
    texts = {(row[0].text, row[2].text): [cell.text for cell in row[3:]] for row in table.rows}
    assert texts["LaViT", "paper"] == ["67.33", "–", "82.61", "45.52"]
    assert texts["LaViT", "ours"] == ["67.3", "67.3", "82.6", "not run"]  # 101 of 150 pairs; 95 of the 115 attributes
    assert texts["LaViT", "ours − paper"] == ["+0.0", "–", "-0.0", "–"] or texts["LaViT", "ours − paper"][2] == "+0.0"
    assert texts["masked", "paper; not run here"][3] == "81.12*†"
    low, high = wilson(202, 300)
    ours = next(row for row in table.rows if row[2].text == "ours")[3]
    assert (ours.low, ours.high) == (low, high) and ours.detail == f"[{100 * low:.1f}, {100 * high:.1f}]"
    assert ours.source.startswith("202 of 300, protocol lmms: lavit/eval/all-on/records.jsonl (SHA-256 ")
    assert any("as printed" in note for note in table.notes) and any("n = 134" in note for note in table.notes)
    assert any("protocol lmms" in note for note in table.notes)


def test_no_cell_is_without_a_source(sheet, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "lavit", answers(0.6, 1)), write_run(tmp_path / "h", answers(0.7, 2), "hard_gate")]
    for name in (sheet, load_sheet("table1"), load_sheet("tableA2")):
        tables = sheet_tables(name, fill(name, runs) if name is sheet else {}, power=True)
        assert all(cell.source for table in tables for row in table.rows for cell in row)
        lines = list(csv.DictReader(io.StringIO(render(tables, ".csv"))))
        assert lines and all(line["source"] for line in lines)
        assert all("title='" in part for part in render(tables[:1], ".html").split("<td")[1:])


def test_differences_are_paired_and_adjusted(sheet, tmp_path: Path) -> None:
    one, two = answers(0.6, 1), answers(0.7, 2)
    runs = [write_run(tmp_path / "lavit", one), write_run(tmp_path / "h", two, "hard_gate")]
    results = fill(sheet, runs)
    table = gain_table(sheet, sheet.line("lavit"), results)
    assert table is not None
    (row,) = table.rows
    expected = paired_bootstrap(two, one)
    assert row[0].text == "hard & fast" and table.title.endswith("differences to LaViT")
    assert (row[1].value, row[1].low, row[1].high) == (expected.mean, expected.low, expected.high)
    p = mcnemar(two, one)
    said = "< 0.0001" if p < 1e-4 else f"{p:.2g}"
    assert f"\np {said}\nHolm " in row[1].detail and "paper -8.00" in row[1].detail
    assert "3 comparisons" in table.notes[0] and row[4].text == "–"


def test_seeds_of_a_row_are_pooled(sheet, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"lavit-{i}", answers(0.6, i)) for i in range(3)]
    ours = fill(sheet, [f"lavit={runs[0]},{runs[1]}", runs[2]])["lavit", "MMVP"].score
    shares = [np.mean(answers(0.6, i)) for i in range(3)]
    assert ours.mean == pytest.approx(np.mean(shares)) and ours.sd == pytest.approx(np.std(shares, ddof=1))
    assert (ours.seeds, ours.n) == (3, 300) and ours.low < ours.mean < ours.high
    text = main_table(sheet, fill(sheet, runs)).to_markdown()
    assert "3 seeds" in text


def test_runs_find_their_rows_or_say_why_not(sheet, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", answers(0.6, 1))
    write_run(run, answers(0.6, 1), latents="off")
    assert set(match(sheet, [run])) == {"lavit", "blind"}
    assert ("blind", "MMVP") in fill(sheet, [run]) and ("blind", "MMVP") in fill(sheet, [f"lavit={run}"])
    other = write_run(tmp_path / "b", answers(0.6, 1), count=6)
    unknown = write_run(tmp_path / "c", answers(0.6, 1), title="hard_gates")
    for words, message in (
        ([other], "called 'lavit', but its latents.count = 6, so it is not the row 'lavit'"),
        ([unknown], "which no row of table 'mine' is.*did you mean 'hard_gate'.*ROW="),
        ([f"lavt={run}"], "no row 'lavt'.*did you mean 'lavit'"),
        ([f"lavit={run},{other}"], "no seeds of one arm: latents.count is 4 and 6"),
        ([f"lavit={run},{run}"], "one run twice"),
        ([tmp_path / "none"], "no run folder"),
    ):
        with pytest.raises(UserError, match=message):
            match(sheet, words)


def test_two_protocols_have_to_be_told_apart(sheet, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", answers(0.6, 1), protocol="lmms")
    write_run(run, answers(0.9, 1), protocol="paper")
    with pytest.raises(UserError, match=r"evaluated twice on 'mmvp'.*--protocol"):
        fill(sheet, [run])
    result = fill(sheet, [run], protocol="paper")["lavit", "MMVP"]
    assert result.protocols == ["paper"] and result.score.mean == pytest.approx(np.mean(answers(0.9, 1)))


def test_a_part_of_the_questions_is_said(sheet, tmp_path: Path) -> None:
    table = main_table(sheet, fill(sheet, [write_run(tmp_path / "a", [True] * 8)]))
    assert "8 of 300 questions" in table.to_markdown()


def test_units_of_pairs_means_and_images() -> None:
    def record(i: int, ok: bool, **groups: str) -> Record:
        return Record("mmstar", str(i), ok, None, groups)

    star = [record(i, i % 3 == 0, l2_category=f"c{i % 2}") for i in range(6)]
    found = units(Column("M", "mmstar", score="macro"), star)
    assert {unit.stratum for unit in found.values()} == {"c0", "c1"} and len(found) == 6
    pairs = [Record("mmvp", str(i), i != 2, None, {"pair": str(i // 2)}) for i in range(5)]
    assert [unit.value for unit in units(Column("M", "mmvp", score="pair"), pairs).values()] == [True, False]
    lab = [Record("microlab_test", f"1{i // 6:02d}0{i % 6}", True, "colour") for i in range(12)]
    found = units(Column("all", "microlab_test", image=r"^(\d+)\d\d$"), lab)
    assert {unit.cluster for unit in found.values()} == {"100", "101"}
    assert units(Column("x", "microlab_test", kind="shape"), lab) == {}


def test_a_sweep_s_cells_are_the_seeds_of_its_arms(sheet, tmp_path: Path) -> None:
    cells = []
    for arm in ("lavit", "hard_gate", "other"):
        for seed in (0, 1):
            write_run(tmp_path / "sweep" / "cells" / f"{arm}-s{seed}", answers(0.6, seed), arm)
            cells.append({"name": f"{arm}-s{seed}", "arm": arm, "label": arm.upper(), "seed": seed})
    cells.append({"name": "never-s0", "arm": "never", "label": "N", "seed": 0})
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"cells": cells}))
    results = fill(sheet, [tmp_path / "sweep"])
    assert results["lavit", "MMVP"].score.seeds == 2 and results["hard", "MMVP"].score.seeds == 2
    assert [run.label for run in load_runs([tmp_path / "sweep"])] == ["LAVIT"] * 2 + ["HARD_GATE"] * 2 + ["OTHER"] * 2


@pytest.mark.parametrize("suffix", [".md", ".tex", ".csv", ".html"])
def test_the_command_writes_each_format(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "lavit", answers(0.6, 1))
    recipe = json.loads((run / "recipe.json").read_text()) | {"gate": {"type": "CosineGate"}}
    (run / "recipe.json").write_text(json.dumps(recipe))
    out = tmp_path / f"table{suffix}"
    words = ["report", f"lavit={run}", "--table", "table3", "--power", "--out", str(out)]
    assert main(words) == 0, capsys.readouterr().err
    text = out.read_text(encoding="utf-8")
    assert ("78.23" in text and "81.12*" in text and "What these questions can show" in text) or suffix == ".csv"
    assert main(["report", "--table", "table1", "--out", str(out)]) == 0  # the printed figures alone
    assert "R1-OneVision" in out.read_text(encoding="utf-8")


def test_a_row_whose_label_has_an_equals_sign_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "lavit", answers(0.6, 1))
    out = tmp_path / "page.html"
    assert main(["report", f"k4_600={run}", "--table", "tableA2", "--out", str(out)]) == 0, capsys.readouterr().err
    assert "K = 4, 600 steps" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs run folders, or --table"),
        (["--table", "table9"], "no table 'table9'"),
        (["x", "--power"], "go with --table"),
        (["--table", "table1", "--out", "x.pdf"], "'.pdf'; allowed"),
    ],
)
def test_mistakes_of_the_command(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *words]) == 2
    assert message in capsys.readouterr().err
