"""Every recipe of the model zoo loads, fits together, is short, and has its row in the table of the zoo's README."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from laavit.cli import COMMANDS
from laavit.cli import main as cli
from laavit.commands import zoo
from laavit.commands.evaluate import main as evaluate
from laavit.compatibility import check
from laavit.paths import project_data
from laavit.recipe import load_recipe
from laavit.registry import UserError

ZOO = project_data("model_zoo")
NAMES = [str(path.relative_to(ZOO)) for path in zoo.recipes(ZOO)]
#: of the micro-lab's pretraining
OTHERS = {"microlab/teacher.py", "microlab/student.py", "microlab/teacher_ungrounded.py"} | {
    f"microlab/hops/student_{depth}.py" for depth in (2, 3, 6, 9)
}


def test_no_recipe_is_left_out() -> None:
    found = {str(path.relative_to(ZOO)) for path in ZOO.rglob("*.py") if path.parent.name != "sweeps"}
    assert found == {*NAMES, *OTHERS}
    assert {path.name for path in ZOO.iterdir() if any(path.glob("*.py"))} == {
        folder.partition("/")[0] for folder in zoo.FOLDERS
    }


@pytest.fixture(scope="module")
def shown() -> str:
    """The table, for which every recipe was loaded and its parts were checked."""
    return zoo.table(ZOO)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_short(name: str) -> None:
    tree = ast.parse((ZOO / name).read_text(encoding="utf-8"))
    rest = tree.body[1:]
    lines = sum(node.end_lineno - node.lineno + 1 for node in rest if node.end_lineno)
    assert lines <= 25 and all(isinstance(node, ast.Assign) for node in rest)


def test_every_recipe_has_a_row(shown: str) -> None:
    assert set(re.findall(r"^\| \[\w+\]\((.*?)\)", shown, re.M)) == set(NAMES)


def test_the_readme_shows_the_table_as_it_is(shown: str) -> None:
    """Stale? ``laavit zoo --write``."""
    readme = (ZOO / "README.md").read_text(encoding="utf-8")
    assert zoo.written(readme, shown) == readme


def small_zoo(folder: Path) -> Path:
    (folder / "lavit").mkdir(parents=True)
    base = 'student = "qwen2_5_vl_3b"\nlatents = dict(name="learned")\ngate = dict(name="cosine", warmup=9)\n'
    (folder / "lavit/base.py").write_text(f'"""A base."""\n\n{base}')
    own = '_base_ = ["./base.py"]\n\ngate = dict(_delete_=True, name="hard")\nlatents = dict(count=(2, 6))\n'
    (folder / "lavit/own.py").write_text(f'"""An ablation\nin two lines.\n\nAnd more.\n"""\n\n{own}')
    (folder / "lavit/results.yaml").write_text("task: {own: [1.25, 50], other: [3]}\n")
    (folder / zoo.EVALUATIONS).write_text("[{row: zero, what: as it is, command: laavit eval X}]")
    return folder


def row_of(folder: Path) -> zoo.Row:
    """The row of ``own``."""
    path = folder / "lavit/own.py"
    return zoo.row_of(path, zoo.recipes(folder)[path], folder)


def test_a_row_says_what_a_recipe_is(tmp_path: Path) -> None:
    row = row_of(small_zoo(tmp_path))
    assert row.cells() == [
        "[own](lavit/own.py)",
        "An ablation in two lines.",
        "[base](lavit/base.py)",
        '`gate = dict(name="hard")`<br>`latents = dict(count=(2, 6))`',
        "qwen2_5_vl_3b",
        "learned × 2–6",
        "hard",
        "",
        "task: 1.2, 50.0",
    ]
    assert len(row.cells()) == len(zoo.HEADINGS)
    text = zoo.table(tmp_path)
    assert "| [base](lavit/base.py) | A base. |  |  | qwen2_5_vl_3b | learned × 4 | cosine |  |  |\n" in text
    assert "| zero | as it is | `laavit eval X` |\n" in text
    (tmp_path / "lavit/own.py").write_text('_base_ = ["./base.py"]\nlatents = "learned"\n')
    with pytest.raises(UserError, match="says in its docstring what it is"):
        zoo.table(tmp_path)
    (tmp_path / "lavit/own.py").write_text('_base_ = ["./base.py"]\nlatents = 1 / 0\n')
    with pytest.raises(UserError, match=r"own\.py does not read as a recipe: ZeroDivisionError"):
        zoo.table(tmp_path)


def test_a_control_and_a_recipe_that_does_not_fit(tmp_path: Path) -> None:
    path = small_zoo(tmp_path) / "lavit/own.py"
    lines = '"""x"""\n_base_ = ["./base.py"]\ntraces = dict(path="t")\n'
    lines += 'targets = dict(a=dict(name="concept", control="random"))\n'
    path.write_text(lines)
    assert row_of(tmp_path).targets == "concept (random)"
    path.write_text(lines + "latents = None\n")
    with pytest.raises(UserError, match=r"own\.py: targets\.a: it reads the latents"):
        row_of(tmp_path)


def test_write_puts_the_table_between_the_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_zoo(tmp_path)
    monkeypatch.setattr(zoo, "project_data", lambda kind: tmp_path if kind == "model_zoo" else None)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{zoo.BEGIN}\nold\n{zoo.END}\nafter\n")
    assert cli(["zoo", "--write"]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{zoo.BEGIN}\n\n### LaViT") and text.endswith(f"{zoo.END}\nafter\n")
    assert "old" not in text and "[own](lavit/own.py)" in text
    with pytest.raises(UserError, match="lacks the markers"):
        zoo.written("nothing", "table")


def test_the_command_prints_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(zoo, "table", lambda folder: f"the table of {folder}")
    assert cli(["zoo"]) == 0
    assert capsys.readouterr().out == f"the table of {ZOO}"


@pytest.mark.parametrize("steps", [600, 800, 1000, 1200, 1400])
@pytest.mark.parametrize(("name", "count"), [("lavit", 4), ("k6", 6), ("k8", 8)])
def test_the_grid_of_table_a2(name: str, count: int, steps: int) -> None:
    recipe = load_recipe(ZOO / f"lavit/{name}.py", ["--train.steps", str(steps)])
    check(recipe)
    gate, train = recipe.build("gate"), recipe.build("train")
    assert recipe.build("latents").layout.most == count and train.steps == steps and train.schedule == "linear"
    assert gate.gamma(399) < 1 == gate.gamma(400)


@pytest.mark.parametrize("name", ["baselines/pause.py", "controls/gaze_no_latents.py"])
def test_plan_works_out_a_recipe(name: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--student", "hf", "--student.path", str(tiny_folder)]
    teacher = ["--teacher", "hf", "--teacher.path", str(tiny_folder)] if name.startswith("controls") else []
    assert cli(["plan", str(ZOO / name), *words, *teacher]) == 0
    assert "trainable" in capsys.readouterr().out


def test_the_evaluations_are_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("laavit.evaluation.run.evaluate", lambda *args, **kwargs: seen.append(args))
    for each in yaml.safe_load((ZOO / zoo.EVALUATIONS).read_text(encoding="utf-8")):
        program, command, *words = each["command"].split()
        assert program == "laavit" and COMMANDS[command][0] == "evaluate"
        assert evaluate(words) == 0
    assert [args[4] for args in seen] == ["on", "off"]


def test_the_ablations_change_one_line() -> None:
    own = {name: (ZOO / f"lavit/{name}.py").read_text(encoding="utf-8") for name in ("hard_gate", "no_concept", "k6")}
    for text in own.values():
        assert len(re.findall(r"^\w+ = ", text, re.M)) == 2  # the base and the line
