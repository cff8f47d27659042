"""Recipes: bases, names, overrides, and one sentence for every mistake, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from laavit.gates import CosineGate, StepGate
from laavit.recipe import Recipe, apply_overrides, load_recipe, parse_overrides
from laavit.registry import UserError

BASE = """
student = dict(name="hf", path="nowhere")
latents = "learned"
gate = dict(name="cosine", warmup=300)
targets = dict(concept=dict(name="concept", weight=0.5), trajectory="trajectory")
train = dict(steps=10)
"""


@pytest.fixture
def cfg(tmp_path: Path) -> Path:
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "cfg.py").write_text('_base_ = ["./base.py"]\ngate = dict(warmup=200)\n')
    return tmp_path / "cfg.py"


def test_bases_names_and_defaults(cfg: Path) -> None:
    recipe = load_recipe(cfg)
    defaults = {"epsilon": 1e-6, "paths": ["answer->image"], "layers": None}
    assert recipe.config["gate"] == {"type": "CosineGate", "warmup": 200, **defaults}
    assert recipe.config["latents"]["count"] == 4 and recipe.config["targets"]["concept"]["weight"] == 0.5
    assert recipe.config["targets"]["trajectory"]["top_k"] == 8  # Sec. 4.1
    assert recipe.config["train"]["steps"] == 10 and recipe.config["train"]["betas"] in ([0.9, 0.999], (0.9, 0.999))
    assert recipe.config["title"] == "cfg" and recipe.config["seed"] == 0
    gate = recipe.build("gate")
    assert isinstance(gate, CosineGate) and gate.warmup == 200 and recipe.build("targets.concept").weight == 0.5
    assert recipe.build("train").steps == 10 and not recipe.has("teacher")


def test_overrides_by_name_and_by_argument(cfg: Path) -> None:
    words = [
        "--gate",
        "hard",
        "--gate.warmup=7",
        "--latents.count",
        "6",
        "--targets.trajectory",
        "null",
        "--seed",
        "3",
        "--train.lr",
        "1e-3",
    ]
    recipe = load_recipe(cfg, [*words, "--train.betas", "[0.9, 0.98]"])
    gate = recipe.build("gate")
    assert isinstance(gate, StepGate) and gate.warmup == 7
    assert list(recipe.config["targets"]) == ["concept"] and recipe.config["latents"]["count"] == 6
    settings = recipe.build("train")
    assert recipe.config["seed"] == 3 and settings.lr == 1e-3 and tuple(settings.betas) == (0.9, 0.98)
    assert load_recipe(cfg, ["--gate", "null"]).config["gate"] is None
    assert load_recipe(cfg, ["--latents.count", "6"]).config["gate"]["warmup"] == 200


def test_the_order_of_overrides_does_not_matter(cfg: Path) -> None:
    one = load_recipe(cfg, ["--gate", "hard", "--gate.warmup", "9"])
    assert one.text() == load_recipe(cfg, ["--gate.warmup", "9", "--gate", "hard"]).text()


def test_a_resolved_recipe_reads_back_the_same(cfg: Path, tmp_path: Path) -> None:
    recipe = load_recipe(cfg, ["--gate", "hard"])
    (tmp_path / "recipe.json").write_text(recipe.text())
    again = load_recipe(tmp_path / "recipe.json")
    assert again.text() == recipe.text() and again.digest() == recipe.digest()
    assert load_recipe(cfg).digest() != recipe.digest()
    assert Recipe(json.loads(recipe.text())).text() == recipe.text()


MISTAKES = [
    ([], "optimiser = dict(lr=1)", "optimiser: no such key in a recipe; allowed: "),
    ([], "gatee = 'cosine'", r"gatee: no such key.*did you mean 'gate'"),
    (["--gate", "cosin"], "", r"gate: no gate is called 'cosin'; allowed: closed, .*did you mean 'cosine'"),
    (["--gate.warmpu", "3"], "", r"gate\.warmpu: CosineGate takes no 'warmpu'; allowed: .*did you mean 'warmup'"),
    (["--gate.warmup", "many"], "", r"gate.*warmup.*(int|integer).*many|gate.*warmup.*many.*int"),
    (["--gate.warmup", "2.5"], "", r"gate.*warmup.*2\.5"),
    (["--gate", "[1]"], "", r"gate: got \[1\]; a component is a name or dict"),
    (["--gate.type", "StepGate"], "", "has either 'name'"),
    ([], "gate = dict(_delete_=True, type='MyGate')", r"gate: no gate is called 'MyGate'; allowed: .*CosineGate"),
    (["--targets.concept.anchor", "3"], "", r"targets\.concept.*anchor.*3"),
    (["--targets.concpet", "concpet"], "", r"targets\.concpet: no target is called.*did you mean 'concept'"),
    (["--targets", "concept"], "", r"targets: expected dict"),
    (["--train", "fast"], "", r"train: expected dict"),
    (["--train.stepps", "3"], "", r"train\.stepps: TrainSettings takes no 'stepps'; .*did you mean 'steps'"),
    (["--train.steps", "soon"], "", r"train.*steps.*soon"),
    (["--train.precision", "fp8"], "", r"train.*precision.*fp8"),
    (["--seed", "x"], "", r"seed: expected int, got 'x'"),
    (["--seed", "true"], "", r"seed: expected int, got True"),
    (["--student", "qwen"], "", r"student: no student is called 'qwen'; allowed: "),
    (["--student", "hf"], "", r"student.*path"),
    (["--gate.warmup"], "", "--gate.warmup needs a value"),
    (["--gate", "--seed", "3"], "", "--gate needs a value"),
    (["gate=hard"], "", r"'gate=hard' is no override; write --key value"),
    (["--seed.x", "3"], "", r"--seed\.x: .*|seed"),
    ([], "custom_imports = ['nowhere.py']", r"custom_imports: no file '.*nowhere\.py'"),
    ([], "custom_imports = ['no_such_module_at_all']", "custom_imports: no module 'no_such_module_at_all'"),
    ([], "gate = dict(", "does not read as a recipe"),
    ([], "gate = 1 / 0", "does not read as a recipe: .*division by zero"),
    ([], "gate = missing_name", "does not read as a recipe: .*missing_name"),
    ([], "import no_such_module_at_all", "does not read as a recipe: .*no_such_module_at_all"),
    ([], "gate = ''.nope", "does not read as a recipe"),
    ([], "gate = int('x')", "does not read as a recipe"),
    ([], "_base_ = ['./absent.py']", "does not read as a recipe: .*absent.py"),
]


@pytest.mark.parametrize(("words", "line", "message"), MISTAKES)
def test_every_mistake_is_one_sentence_with_its_key(cfg: Path, words: list[str], line: str, message: str) -> None:
    if line:
        text = line if line.startswith("_base_") else cfg.read_text() + line + "\n"
        cfg.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(cfg, words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.py", ".", "cfg.txt", "broken.json", "list.json"])
def test_what_is_no_recipe(tmp_path: Path, name: str) -> None:
    (tmp_path / "cfg.txt").write_text("gate")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / name)
    assert "\n" not in str(caught.value) and name.rstrip(".") in str(caught.value)


def test_a_part_that_is_left_out_is_named_when_it_is_needed(cfg: Path) -> None:
    recipe = load_recipe(cfg)
    for key in ("teacher", "data", "targets.absent"):
        with pytest.raises(UserError, match=rf"{key}: this recipe \(cfg\) has none"):
            recipe.build(key)


def test_settings_are_checked_when_they_are_built(cfg: Path) -> None:
    for word, value in (("steps", "0"), ("lr", ".nan"), ("lr", "-1"), ("batch_size", "0"), ("clip_grad", ".inf")):
        with pytest.raises(UserError, match=rf"train\.{word}: got"):
            load_recipe(cfg, [f"--train.{word}", value]).build("train")


def test_overrides_are_plain_yaml() -> None:
    given = parse_overrides(["--a", "1", "--b=x=y", "--c", "[1, 2]", "--d", "null", "--e", "-1", "--f", "it's: {"])
    assert given == {"a": 1, "b": "x=y", "c": [1, 2], "d": None, "e": -1, "f": "it's: {"}
    before: dict[str, Any] = {"gate": "cosine"}
    assert apply_overrides(before, {"gate.warmup": 3}) == {"gate": {"name": "cosine", "warmup": 3}}
    assert before == {"gate": "cosine"}


def test_a_gate_from_a_file_beside_the_recipe(cfg: Path, tmp_path: Path) -> None:
    (tmp_path / "my_gate.py").write_text(
        "from laavit.gates import Gate\nfrom laavit.registry import GATES\n\n\n"
        "@GATES.register_module()\nclass RecipeTestGate(Gate):\n    def __init__(self, power: float = 2.0) -> None:\n"
        "        super().__init__()\n        self.power = power\n\n"
        "    def gamma(self, step: int) -> float:\n        return min(1.0, step / 10) ** self.power\n"
    )
    cfg.write_text(
        '_base_ = ["./base.py"]\ncustom_imports = ["my_gate.py"]\n'
        "gate = dict(_delete_=True, type='RecipeTestGate', power=3.0)\n"
    )
    gate = load_recipe(cfg).build("gate")
    assert gate.gamma(5) == 0.125 and gate.paths == ("answer->image",)
    with pytest.raises(UserError, match=r"gate\.pwoer: RecipeTestGate takes no 'pwoer'.*did you mean 'power'"):
        load_recipe(cfg, ["--gate.pwoer", "2"])
    # The resolved recipe finds the file from wherever it is read.
    elsewhere = tmp_path / "runs"
    elsewhere.mkdir()
    (elsewhere / "recipe.json").write_text(load_recipe(cfg).text())
    assert Path(load_recipe(elsewhere / "recipe.json").config["custom_imports"][0]) == tmp_path / "my_gate.py"


def test_a_custom_file_with_a_mistake_is_named(cfg: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("class (:\n")
    cfg.write_text('_base_ = ["./base.py"]\ncustom_imports = ["mine.py"]\n')
    with pytest.raises(UserError, match=r"custom_imports: .*mine\.py"):
        load_recipe(cfg)
