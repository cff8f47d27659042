"""``laavit analyse``: data given in three ways, figures and pictures written, mistakes in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from laavit.cli import run
from laavit.commands.analyse import ANALYSES
from laavit.microlab.dataset import DatasetSettings, write_dataset

TEACHER, STUDENT = (f"{name}=zoo:microlab/{name}@header+answer@-2,-1" for name in ("teacher", "student"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    write_dataset(folder, DatasetSettings(train=1, val=1, test=4))
    return folder


def visual_cot(scenes: Path) -> list[str]:
    return ["--annotations", str(scenes / "test.json"), "--root", str(scenes / "images")]


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_writes_its_figures_and_its_picture(
    name: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--show", "2"] if name == "overlay" else ["--limit", "10", "--seed", "3"]
    words = [name, str(tmp_path), TEACHER, STUDENT, *visual_cot(scenes), *more, "--max-new-tokens", "3"]
    assert run("analyse", words) == 0
    found = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert found["analysis"] == name and found["n"] == (2 if name == "overlay" else 10)
    assert Image.open(tmp_path / f"{name}.png").width > 600
    said = capsys.readouterr().out
    if name == "focus":
        records = [json.loads(line) for line in (tmp_path / "focus.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len(records) == 20 and {each["model"] for each in records} == {"teacher", "student"}
        right = [each["focus"] for each in records if each["model"] == "teacher" and each["correct"]]
        assert found["models"]["teacher"]["focus_correct"][0] == pytest.approx(sum(right) / len(right))
    if name == "gap":
        assert found["students"]["student"]["widths"] == [128, 96] and found["students"]["student"]["cosine"] is None
        assert "cka_distance" in said and "kl all" in said
    if name == "attention":
        assert "teacher: entropy" in said and "in_box" in said


def test_readers_by_name_and_recipes_give_the_same_samples(scenes: Path, tmp_path: Path) -> None:
    """The micro-lab's questions as Visual-CoT, as a table of Parquet, and by a recipe."""
    common = [TEACHER, "--limit", "5"]
    columns = "{question: question, answer: answer, image: image, boxes: boxes, id: id, source: kind}"
    table = ["--data", "hf", f"--data.annotations={scenes / 'eval'}", "--data.columns", columns, "--data.split", "test"]
    recipe = ["--recipe", "zoo:microlab/lavit.py", "--data.annotations", str(scenes / "test.json")]
    recipe += ["--data.root", str(scenes / "images")]
    found = []
    for number, data in enumerate((visual_cot(scenes), table, recipe)):
        assert run("analyse", ["attention", str(tmp_path / str(number)), *common, *data]) == 0
        found.append(json.loads((tmp_path / f"{number}/attention.json").read_text(encoding="utf-8"))["models"])
    assert found[0] == found[2]
    first, second = (found[number]["teacher"] for number in (0, 1))
    assert first["entropy"] == second["entropy"]
    assert first["in_box"]["mean"] == pytest.approx(second["in_box"]["mean"], abs=2e-3)  # boxes of three decimals


def test_gaze_takes_any_reader_too(scenes: Path, tmp_path: Path) -> None:
    data = ["--data", "visual_cot", "--data.annotations", str(scenes / "test.json")]
    data += ["--data.root", str(scenes / "images")]
    for number, given in enumerate((visual_cot(scenes), data)):
        assert run("gaze", [str(tmp_path / str(number)), TEACHER, *given, "--limit", "3", "--show", "1"]) == 0
    first, second = ((tmp_path / f"{n}/statistics.json").read_text(encoding="utf-8") for n in (0, 1))
    assert first == second and json.loads(first)["teacher"]["n"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["focsu"], "no analysis is called 'focsu'; allowed: attention, focus, gap, overlay (did you mean 'focus'?)"),
        (["focus", "OUT", "a=b"], "no data are given"),
        (["focus", "OUT", "a=b", "--annotations", "x"], "--annotations goes with --root"),
        (["focus", "OUT", "a=b", "DATA", "--data", "hf"], "--annotations goes with --root"),
        (["focus", "OUT", "a", "DATA"], "'a' is no looker"),
        (["focus", "OUT", "a=b", "DATA", "--limit", "0"], "--limit: at least 1, got 0"),
        (["focus", "OUT", "a=b", "DATA", "--batch-size", "0"], "--batch-size: at least 1, got 0"),
        (["gap", "OUT", "a=b", "DATA"], "needs a teacher and at least one student"),
        (["gap", "OUT", "a=b", "c=d", "DATA", "--tagger", "x"], "no tagger is called 'x'"),
        (["gap", "OUT", "a=b", "c=d", "DATA", "--unit", "letter"], "invalid choice: 'letter'"),
        (["overlay", "OUT", "a=b", "DATA", "--show", "0"], "--show: at least 1, got 0"),
        (["attention", "OUT", "a=b", "--data", "visual_cto"], "did you mean 'visual_cot'?"),
        (["attention", "OUT", "a=zoo:microlab/student@latents", "DATA"], "has no latents"),
        (["attention", "OUT", "a=b", "a=c", "DATA"], "two lookers are called 'a'"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], message: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"OUT": [str(tmp_path / "out")], "DATA": visual_cot(scenes)}
    assert run("analyse", [part for word in words for part in given.get(word, [word])]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))


def test_help_lists_the_analyses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("analyse", []) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in ANALYSES)
