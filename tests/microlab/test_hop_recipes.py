"""The second study's recipes are what their names say, and its sweeps run them on students of their own depth."""

from __future__ import annotations

from pathlib import Path

import pytest

from laavit.commands.zoo import recipes
from laavit.paths import project_data
from laavit.recipe import load_recipe
from laavit.sweeps.settings import read_arms, read_sweep

ZOO = project_data("model_zoo")
HOPS = [path for path in recipes(ZOO) if path.parent.name == "hops"]


@pytest.mark.parametrize(("name", "depth"), [("hops", 3), ("hops_6", 6), ("hops_9", 9)])
def test_a_sweep_runs_the_recipes_at_its_depth(name: str, depth: int) -> None:
    sweep = read_sweep(ZOO / f"microlab/sweeps/{name}.py")
    arms = read_arms(sweep, ZOO / "microlab/sweeps")
    used = {Path(arm.recipe) for arm in arms.values() if arm.recipe}
    assert used <= set(HOPS) and (depth > 3 or used == set(HOPS))
    assert all(Path(arm.recipe).stem == key for key, arm in arms.items() if arm.recipe)
    assert sweep.per_seed["student.path"] == arms["base"].model == f"runs/hops/students/{depth}-{{seed}}"
    assert sweep.out and sweep.out.endswith(str(depth)) and sweep.reference in arms
    made = [command for stage in sweep.stages for command in stage]
    assert any(f"student_{depth}.py" in each.run and f"students/{depth}-{{seed}}" in each.run for each in made)
    shown = load_recipe(HOPS[0]).arguments("data")["annotations"]
    assert any(each.run.startswith(f"laavit microlab {Path(shown).parent} --kinds hops") for each in made)


@pytest.mark.parametrize("path", HOPS, ids=lambda path: path.stem)
def test_an_arm_is_what_its_name_says(path: Path) -> None:
    recipe = load_recipe(path)
    name, targets = path.stem, recipe.config["targets"]
    kind = (recipe.config["latents"] or {"type": ""})["type"]
    assert kind == ("LearnedLatents" if "latents" in name else "FeedbackLatents" if "feedback" in name else "")
    assert recipe.config["train"]["steps"] == (1400 if name.endswith("long") else 800)
    own = targets.get("latents", {})
    assert own.get("order", "given") == next((w for w in ("reversed", "shuffled") if w in name and kind), "given")
    assert own.get("steps") == (
        "steps_by_layer"
        if "by_layer" in name
        else "steps"
        if "steps" in name
        else "aggregate"
        if "map" in name
        else None
    )
    answer = "gaze" in name or name in ("feedback_steps_reversed", "feedback_steps_shuffled")
    assert ("answer" in targets) == answer
    if answer and kind:
        assert targets["answer"]["steps"] == "final" and list(targets["answer"]["rows"]) == ["answer"]
