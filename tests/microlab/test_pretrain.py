from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from laavit.microlab.packing import Packer
from laavit.microlab.pretrain import (
    AnswerSettings,
    evaluate,
    grounding_loss,
    load_pretrain_recipe,
    main,
    take_tower,
    train_answers,
)
from laavit.microlab.questions import QUESTION_KINDS
from laavit.microlab.scenes import make_scene
from laavit.microlab.shipping import verify
from laavit.microlab.vision import cache_features
from laavit.paths import project_data
from laavit.registry import UserError

RECIPE = """
name = "student"
validation = 2
sizes = dict(text_width=48, text_layers=2, vision_width=32, vision_layers=1)
vision = dict(steps=2, batch_size=2)
answers = dict(scenes=6, steps=3, batch_size=3, grounding=0.5, layers=(-1,))
"""


def test_grounding_is_zero_at_its_optimum_and_equals_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(2, 3, 36, generator=generator, dtype=torch.float64) * (torch.arange(36) < 9)
    boxes = boxes / boxes.sum(-1, keepdim=True)
    gaze = torch.rand(2, 3, 5, 36, generator=generator, dtype=torch.float64)
    gaze = (gaze / gaze.sum(-1, keepdim=True)).requires_grad_()
    assert grounding_loss(boxes[:, :, None].expand(-1, -1, 5, -1), boxes).item() == pytest.approx(0, abs=1e-12)
    inside = boxes[..., :9, None].transpose(-1, -2)
    formula = (inside * (inside / gaze[..., :9]).log()).sum(-1).mean()
    loss = grounding_loss(gaze, boxes)
    assert loss.item() == pytest.approx(formula.item(), abs=1e-12)
    wanted = torch.autograd.grad(formula, gaze)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, gaze)[0], wanted, rtol=0, atol=1e-12)


def test_training_teaches_answers_and_gaze_and_leaves_the_tower_alone(model: Any, processor: Any) -> None:
    scenes = [make_scene(5, index) for index in range(16)]
    packer = Packer(processor, list(QUESTION_KINDS))
    packed, features = packer.pack(scenes), cache_features(model, processor, scenes)
    tower = {name: p.clone() for name, p in model.model.visual.named_parameters()}
    before = evaluate(model, packer, features, packed)
    settings = AnswerSettings(steps=120, batch_size=8, lr=4e-3, grounding=1.0, layers=(-1,))
    train_answers(model, packer, features, packed, settings, seed=0)
    after = evaluate(model, packer, features, packed)
    assert after["mean"] > before["mean"] + 0.3
    assert after["in_box"]["answer"][1] > before["in_box"]["answer"][1] + 0.1
    assert set(after["accuracy"]) == set(QUESTION_KINDS) and set(after["in_box"]) == {"question", "header", "answer"}
    assert all(torch.equal(p, tower[name]) for name, p in model.model.visual.named_parameters())


def test_without_grounding_no_attention_is_recorded(
    model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    packer = Packer(processor, ["depth"])
    scenes = [make_scene(5, index) for index in range(2)]
    contexts = []
    hidden = packer.hidden
    monkeypatch.setattr(packer, "hidden", lambda *a: contexts.append(a[-1]) or hidden(*a))
    features = cache_features(model, processor, scenes)
    train_answers(model, packer, features, packer.pack(scenes), AnswerSettings(steps=1, batch_size=2), seed=0)
    assert contexts == [None]


def test_the_command_writes_a_complete_folder_that_a_second_run_repeats(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    for name in ("one", "two"):
        assert main([str(recipe), "--out", str(tmp_path / name), "--seed", "7"]) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert verify(one) == []
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    report = json.loads((one / "training.json").read_text())
    assert report["recipe"]["seed"] == 7 and report["recipe"]["answers"]["grounding"] == 0.5
    assert len(report["figures"]["validation"]["in_box"]["header"]) == 2
    card = (one / "card.md").read_text()
    assert "grounded with boxes" in card and "| relation |" in card
    (one / "model.safetensors").write_bytes(b"")
    (one / "config.json").unlink()
    assert verify(one) == ["config.json", "model.safetensors"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("answers = dict(step=3)", "answers: there is no 'step'.*did you mean 'steps'"),
        ("vison = dict(steps=3)", "recipe: there is no 'vison'.*did you mean 'vision'"),
        ("sizes = dict(text_widht=3)", "sizes: there is no 'text_widht'"),
        ("kinds = ('color',)", "kinds: no kind of question is called 'color'.*did you mean 'colour'"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, line: str, message: str) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"name = 'x'\n{line}\n")
    with pytest.raises(UserError, match=message):
        load_pretrain_recipe(recipe)


def test_a_missing_recipe_or_name_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.py"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: the recipe")
    (tmp_path / "empty.py").write_text("seed = 1\n")
    with pytest.raises(UserError, match=r"recipe: .*name"):
        load_pretrain_recipe(tmp_path / "empty.py")


def test_a_tower_is_taken_bit_for_bit_and_hops_are_asked(tmp_path: Path) -> None:
    one, recipe = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text(RECIPE)
    recipe.write_text(
        RECIPE.replace("text_layers=2", "text_layers=1") + 'kinds = ("one_hop_colour", "three_hop_shape")\n'
    )
    assert main([str(one), "--out", str(tmp_path / "one")]) == 0
    words = ["--seed", "7", "--tower", str(tmp_path / "one")]
    assert main([str(recipe), "--out", str(tmp_path / "two"), *words]) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    tower = {name for name in first if "visual" in name}
    assert tower and all(torch.equal(first[name], second[name]) for name in tower)
    words = [next(value for name, value in each.items() if "embed_tokens" in name) for each in (first, second)]
    assert not torch.equal(*words)
    report = json.loads((tmp_path / "two/training.json").read_text())
    assert report["recipe"]["vision"]["path"] == str(tmp_path / "one") and report["figures"]["vision"] == {}
    assert set(report["figures"]["validation"]["accuracy"]) == set(report["recipe"]["kinds"])
    card = (tmp_path / "two/card.md").read_text()
    assert f"the vision tower of `{tmp_path / 'one'}` as it is" in card
    assert re.search(r"\| one_hop_colour \| [\d.]+ \| 0\.167 \|", card)


def test_a_tower_that_does_not_fit_is_named(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vision\.path: 'nowhere' holds no model"):
        take_tower(model, "nowhere")
    with pytest.raises(UserError, match=r"the tower of .zoo:microlab/student. does not fit these sizes: "):
        take_tower(model, "zoo:microlab/student")


@pytest.mark.parametrize("depth", [3, 6, 9])
def test_the_hops_students_differ_by_depth_alone(depth: int) -> None:
    recipe = load_pretrain_recipe(project_data("model_zoo") / f"microlab/hops/student_{depth}.py")
    other = load_pretrain_recipe(project_data("model_zoo") / "microlab/hops/student_3.py")
    assert recipe.sizes.text_layers == depth and recipe.vision.path == "zoo:microlab/student"
    assert replace(recipe, name="", sizes=other.sizes) == replace(other, name="")


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_shipped_recipes_load(name: str) -> None:
    recipe = load_pretrain_recipe(project_data("model_zoo") / "microlab" / f"{name}.py")
    assert recipe.name == name
    assert (recipe.answers.grounding > 0) == (name == "teacher")
    assert recipe.answers.scene_seed not in (101, 102, 103)
