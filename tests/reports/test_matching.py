"""Runs of one row are seeds of one arm."""

from pathlib import Path

import pytest

from laavit.registry import UserError
from laavit.reports.matching import _seeds
from laavit.reports.runs import Run

TRAJECTORY = {"type": "Trajectory", "weight": 0.3}


def runs(*recipes: dict) -> list[Run]:
    return [Run(Path(f"runs/{i}"), "row", recipe) for i, recipe in enumerate(recipes)]


def test_a_part_that_one_lacks_is_another_arm() -> None:
    whole = {"seed": 0, "targets": {"concept": {"type": "Concept"}, "trajectory": TRAJECTORY}}
    less = {"seed": 1, "targets": {"concept": {"type": "Concept"}}}
    for pair in (runs(whole, less), runs(less, whole)):
        with pytest.raises(UserError, match=r"no seeds of one arm: targets.trajectory.type is .*not there"):
            _seeds("row", pair)


def test_a_setting_that_an_older_recipe_lacks_is_none() -> None:
    _seeds("row", runs({"seed": 0, "gate": {"type": "G"}}, {"seed": 1, "gate": {"type": "G", "epsilon": 0.1}}))


def test_a_path_may_name_the_seed_of_its_run() -> None:
    def recipe(seed: int, path: str) -> dict:
        return {"seed": seed, "student": {"type": "HF", "path": path}}

    _seeds("row", runs(recipe(0, "runs/students/3-0"), recipe(1, "runs/students/3-1")))
    for other in ("runs/students/3-2", "runs/students/13-1", "elsewhere/3-1"):
        with pytest.raises(UserError, match=r"no seeds of one arm: student\.path"):
            _seeds("row", runs(recipe(0, "runs/students/3-0"), recipe(1, other)))
