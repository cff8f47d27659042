"""A sweep file becomes cells, each with its resolved recipe; what is wrong is said before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from laavit.cli import main as cli
from laavit.registry import UserError
from laavit.sweeps.plan import Plan, changed, check_stores, check_tasks, plan_of
from laavit.sweeps.settings import Questions, read_sweep


def plan(folder: Path, out: Path, text: str = "", **overrides: Any) -> Plan:
    file = folder / "sweep.py"
    if text:
        file = out / "own.py"
        out.mkdir(exist_ok=True)
        file.write_text(text)
    return plan_of(read_sweep(file, overrides), folder, out)


def test_cells_stand_seed_by_seed_with_resolved_recipes(lab_folder: Path, tmp_path: Path) -> None:
    found = plan(lab_folder, tmp_path)
    assert [c.name for c in found.cells] == ["start-s0", "naive-s0", "latents-s0", "naive-s1", "latents-s1"]
    latents = found.cell("latents-s1")
    assert latents.recipe is not None and latents.recipe["seed"] == 1 and latents.recipe["latents"]["count"] == 2
    assert latents.latents == ("on", "off") and found.cell("naive-s1").latents == ("on",)
    assert found.cell("0").model == str(lab_folder / "student") and found.cells[0].recipe is None
    found.write()
    assert Plan.read(tmp_path / "sweep.json") == found


def test_yaml_grid_overrides_and_values_of_a_seed(lab_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "students").mkdir()
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"name: grid\nbase: {lab_folder}/latents.py\nseeds: [3, 4]\n"
        "evaluate: {tasks: [microlab_test], latents: [on, off]}\n"
        "grid: {latents.count: [1, 2], train.steps: [5, 6]}\noverrides: {train.lr: 0.5, train.steps: 9}\n"
        f"per_seed: {{student.path: '{lab_folder}/student-{{seed}}'}}\n"
    )
    cells = plan_of(read_sweep(file), tmp_path, tmp_path / "out").cells
    assert [cell.name for cell in cells[:4]] == [f"count={k}+steps={n}-s3" for k in (1, 2) for n in (5, 6)]
    recipes = [cell.recipe for cell in cells if cell.recipe]
    assert len(recipes) == 8 and {recipe["train"]["lr"] for recipe in recipes} == {0.5}
    assert [recipe["train"]["steps"] for recipe in recipes[:4]] == [5, 6, 5, 6]
    assert [Path(recipe["student"]["path"]).name for recipe in recipes[3:5]] == ["student-3", "student-4"]
    assert cells[0].latents == ("on", "off")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"arm": {}}, "arm: no such key in a sweep; .*did you mean 'arms'"),
        ({"evaluate.task": ["x"]}, "evaluate.task: Questions takes no 'task'"),
        ({"evaluate.latents": ["of"]}, "evaluate.latents: got 'of'; allowed: on, off, or how many"),
        ({"seeds": [1, 1]}, "seeds: got .1, 1.; allowed: one or more, all different"),
        ({"reference": "nave"}, "no arm 'nave'; .*did you mean 'naive'"),
        ({"grid": {"train.steps": 5}}, "grid.train.steps: got 5; allowed: a list"),
        ({"per_seed": {"student.path": "x"}}, "per_seed.student.path: got 'x'; it has to hold"),
        ({"arms": {"a": {"model": "x", "overrides": {"seed": 1}}}}, "arms.a: 'model' is evaluated as it is"),
        ({"base": None}, "arms.naive: it names neither a recipe nor a model"),
        ({"overrides": {"train.step": 1}}, "naive-s0: train.step: TrainSettings takes no 'step'"),
        ({"overrides": {"gate": "cosin"}}, "naive-s0: gate: no gate is called 'cosin'"),
        ({"overrides": {"targets": {"look": {"name": "concept"}}}}, "naive-s0: targets.look: it reads the latents"),
        ({"arms": {"a b": None, "a_b": None}}, "two cells of the sweep are called 'a_b-s0'"),
    ],
)
def test_mistakes_are_named_at_once(lab_folder: Path, tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(lab_folder, tmp_path, **overrides)


def test_a_bad_cell_ends_the_command_before_the_first_one(
    lab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", str(lab_folder / "sweep.py"), "--out", str(tmp_path / "out")]
    assert cli([*words, "--override", "train.steps=many"]) == 2
    assert "naive-s0: train.steps" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli([*words, "--only", "naiv"]) == 2
    assert "no arm 'naiv'" in capsys.readouterr().err
    assert cli([*words, "--seeds", "7"]) == 2
    assert "no seed 7; allowed: 0, 1" in capsys.readouterr().err
    assert cli([*words, "--max-minutes", "-3"]) == 2
    assert "got '-3'; allowed: a number of minutes, 0 or more" in capsys.readouterr().err


def test_an_override_that_would_change_nothing_is_refused(
    lab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What grids, seeds and arms set goes before the command line's overrides, which would be lost without a word."""
    file = tmp_path / "sweep.yaml"
    arms = {"naive": {"recipe": str(lab_folder / "naive.py"), "overrides": {"train.lr": 0.1}}}
    sweep = {
        "name": "own",
        "arms": arms,
        "grid": {"train.steps": [1, 2]},
        "per_seed": {"train.threads": "{seed}"},
        "seeds": [1],
    }
    file.write_text(yaml.safe_dump(sweep))
    words = ["sweep", str(file), "--dry-run", "--override"]
    for key, holder in (("train.steps", "grid"), ("train.threads", "per_seed"), ("train.lr", "the arm 'naive'")):
        assert cli([*words, f"{key}=3"]) == 2
        assert f"--override {key}: {holder} of the sweep sets it" in capsys.readouterr().err
    assert cli([*words, "train.log_every=3"]) == 0


def test_a_dry_run_lists_and_leaves_nothing(
    lab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", str(lab_folder / "sweep.py"), "--out", str(tmp_path / "out"), "--dry-run"]
    assert cli([*words, "--only", "naive", "start", "--seeds", "1", "--override", "train.steps=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["start-s0", "naive-s1"] and "7 steps" in lines[1]
    assert lines[-1].startswith("2 cells, 0 done") and not (tmp_path / "out").exists()


def test_a_folder_of_another_plan_is_told(lab_folder: Path, tmp_path: Path) -> None:
    first = plan(lab_folder, tmp_path)
    cell = first.cell("naive-s0")
    first.folder(cell).mkdir(parents=True)
    (first.folder(cell) / "recipe.json").write_text(json.dumps(cell.recipe))
    assert changed(first, cell) is None
    other = plan(lab_folder, tmp_path, overrides={"train.lr": 0.7})
    assert changed(other, other.cell("naive-s0")) == "its recipe was another one (train.lr)"
    assert changed(other, other.cell("naive-s1")) is None
    answers = first.evaluation(cell, "on")
    answers.mkdir(parents=True)
    (answers / "summary.json").write_text('{"limit": null, "tasks": {}}')
    assert changed(first, cell) is None and first.evaluated(cell, "on") and not first.finished(cell)
    limited = plan(lab_folder, tmp_path, evaluate=dict(tasks=["microlab_test"], limit=3))
    assert changed(limited, limited.cell("naive-s0")) == "evaluate.limit was None and is 3"


def test_what_before_was_to_make_is_missed(lab_folder: Path, tmp_path: Path) -> None:
    found = plan(lab_folder, tmp_path, overrides={"data.annotations": str(tmp_path / "none.json")})
    with pytest.raises(UserError, match=r"naive-s0: there are no annotations at .*none\.json"):
        check_stores(found, found.cells)
    text = f'name = "s"\nbase = "{lab_folder}/latents.py"\n'
    text += 'overrides = {"targets.look": dict(name="trajectory"), "traces.path": "nowhere"}\n'
    text += f'overrides["teacher"] = dict(name="hf", path="{lab_folder}/student")\n'
    found = plan(lab_folder, tmp_path, text)
    with pytest.raises(UserError, match="latents-s0: there is no trace store at 'nowhere'"):
        check_stores(found, found.cells)


def test_a_model_that_is_not_there_is_named(lab_folder: Path, tmp_path: Path) -> None:
    text = 'name = "s"\narms = dict(start=dict(model="{}"))\nevaluate = dict(tasks=["microlab_test"])\n'
    with pytest.raises(UserError, match="start-s0: there is no model at 'runs/no/where'"):
        found = plan(lab_folder, tmp_path, text.format("runs/no/where"))
        check_stores(found, found.cells)
    for name in ("someone/model", tmp_path):
        found = plan(lab_folder, tmp_path, text.format(name))
        check_stores(found, found.cells)


def test_tasks_are_known() -> None:
    check_tasks(Questions(tasks=("microlab_test",)))
    with pytest.raises(UserError, match=r"no task is called 'microlab_tset'; .*microlab_test"):
        check_tasks(Questions(tasks=("microlab_tset",)))
