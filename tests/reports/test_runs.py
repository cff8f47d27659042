"""Run folders: what is read, and that damage and contradictions stop instead of being drawn."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from laavit.registry import UserError
from laavit.reports.runs import load_run, load_runs


def test_a_run_is_read(make_runs: Callable[[], list[Path]]) -> None:
    run = load_run(make_runs()[2], "LaViT")
    assert run.label == "LaViT" and run.recipe["seed"] == 3 and len(run.recipe_hash) == 64
    assert [(one.name, one.latents, len(one.records)) for one in run.evaluations] == [
        ("test", "on", 240),
        ("test-off", "off", 240),
    ]
    assert run.evaluations[0].source == "lavit/eval/test/records.jsonl"
    assert len(run.gaze) == 3 and run.gaze[0].maps["teacher"].shape == (6, 6)
    assert run.log[0]["iter"] == 1 and len(run.log) == 200


def test_a_resumed_log_counts_each_step_once(make_runs: Callable[[], list[Path]]) -> None:
    log = make_runs()[1] / "log.jsonl"
    with log.open("a") as stream:
        stream.write(json.dumps({"iter": 399, "ntp": 9.0}) + "\n" + '{"iter": 401, "nt')  # killed in mid-line
    steps = load_run(log.parent).log
    assert len(steps) == 200 and steps[-1]["ntp"] == 9.0


def test_a_log_damaged_in_the_middle_is_said(make_runs: Callable[[], list[Path]]) -> None:
    log = make_runs()[1] / "log.jsonl"
    log.write_text("{]\n" + log.read_text())
    with pytest.raises(UserError, match=r"log\.jsonl, line 1 is not valid JSON"):
        load_run(log.parent)


def test_a_summary_that_contradicts_its_records_is_refused(make_runs: Callable[[], list[Path]]) -> None:
    summary = make_runs()[0] / "eval" / "test" / "summary.json"
    said = json.loads(summary.read_text())
    said["tasks"]["microlab"]["accuracy"] += 0.01
    summary.write_text(json.dumps(said))
    with pytest.raises(UserError, match="evaluate the run again"):
        load_run(summary.parents[2])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"task": "microlab", "id": "colour-0", "correct": True}, "a second time"),
        ({"task": "microlab", "id": "new", "correct": 0.5}, "'correct' is 0.5; true and false are allowed"),
        ({"task": "microlab", "correct": True}, "has no 'id'"),
    ],
)
def test_a_wrong_record_is_refused(make_runs: Callable[[], list[Path]], line: dict, message: str) -> None:
    records = make_runs()[0] / "eval" / "test" / "records.jsonl"
    records.write_text(records.read_text() + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=message):
        load_run(records.parents[2])


def test_a_map_that_does_not_fit_its_grid_is_refused(make_runs: Callable[[], list[Path]]) -> None:
    index = make_runs()[2] / "gaze" / "index.json"
    samples = json.loads(index.read_text())
    samples[1]["maps"]["base"]["grid"] = [6, 5]
    index.write_text(json.dumps(samples))
    with pytest.raises(UserError, match="'base' has 36 values for a grid of 6 x 5"):
        load_run(index.parents[1])


def test_a_missing_folder_and_no_evaluation_are_said(make_runs: Callable[[], list[Path]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run folder"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="evaluate a run first"):
        load_runs([tmp_path / "empty"])
    with pytest.raises(UserError, match="at least one run"):
        load_runs([])
