"""The shipped models are what their recipes, cards and hashes say."""

from __future__ import annotations

import json

import pytest
import torch

from laavit.backbones import Backbone
from laavit.microlab.dataset import SPLIT_SEEDS
from laavit.microlab.packing import Packer
from laavit.microlab.pretrain import evaluate, load_pretrain_recipe
from laavit.microlab.questions import QUESTION_KINDS
from laavit.microlab.scenes import make_scene
from laavit.microlab.shipping import CARD, card, verify
from laavit.microlab.vision import cache_features
from laavit.paths import project_data

ZOO = project_data("model_zoo") / "microlab"


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_files_recipe_and_card_belong_together(name: str) -> None:
    folder = ZOO / name
    assert verify(folder) == []
    report = json.loads((folder / "training.json").read_text())
    assert json.loads(json.dumps(load_pretrain_recipe(ZOO / f"{name}.py").plain())) == report["recipe"]
    assert (folder / CARD).read_text() == card(report["recipe"], report["figures"])
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000_000


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_shipped_model_does_what_its_card_says(name: str) -> None:
    torch.set_num_threads(1)
    stated = json.loads((ZOO / name / "training.json").read_text())["figures"]["validation"]
    backbone = Backbone.load(str(ZOO / name))
    scenes = [make_scene(SPLIT_SEEDS["val"], index) for index in range(150)]
    packer = Packer(backbone.processor, list(QUESTION_KINDS))
    features = cache_features(backbone.model, backbone.processor, scenes)
    found = evaluate(backbone.model, packer, features, packer.pack(scenes))
    # 900 answers: another CPU's rounding may turn a few of them
    assert found["mean"] == pytest.approx(stated["mean"], abs=0.01)
    for rows, masses in stated["in_box"].items():
        assert found["in_box"][rows] == pytest.approx(masses, abs=0.02)
    if name == "teacher":
        assert found["mean"] >= 0.8
        assert min(found["in_box"][rows][layer] for rows in ("header", "answer") for layer in (-2, -1)) >= 0.75
