import dataclasses
import inspect
import json
import re

import pytest

from laavit.engine import TrainSettings
from laavit.recipe import checked
from laavit.registry import UserError


def test_defaults_are_table_a1():
    s = TrainSettings()
    assert (s.steps, s.batch_size, s.lr, s.betas, s.weight_decay) == (1000, 16, 5e-6, (0.9, 0.999), 0.0)
    assert (s.warmup_ratio, s.schedule) == (0.03, "linear")


def test_every_field_is_documented():
    documented = set(
        re.findall(r"^ {8}(\w+): ", "        " + inspect.cleandoc(TrainSettings.__doc__).replace("\n", "\n    "), re.M)
    )
    assert documented == {field.name for field in dataclasses.fields(TrainSettings)}


def test_a_recipe_checks_types_and_the_result_is_json():
    plain = checked("train", TrainSettings, {"steps": 5, "betas": [0.9, 0.95], "precision": "bf16"})
    made = TrainSettings(**plain)
    assert made.betas == (0.9, 0.95)
    assert TrainSettings(**json.loads(json.dumps(made.as_dict()))) == made
    with pytest.raises(UserError, match=r"train\.step: .*did you mean 'steps'"):
        checked("train", TrainSettings, {"step": 5})
    with pytest.raises(UserError, match="train"):
        checked("train", TrainSettings, {"steps": "many"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "train.steps: got 0; allowed: 1 or more"),
        ({"lr": float("nan")}, "train.lr: got nan"),
        ({"warmup_ratio": 1.5}, "train.warmup_ratio: got 1.5; allowed: 0 to 1"),
        ({"betas": (0.9, 1.0)}, "train.betas"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"precision": "fp16"}, "allowed: bf16, fp32"),
        ({"threads": 0}, "train.threads"),
        ({"seed": -1}, "train.seed"),
    ],
)
def test_wrong_values_are_told_in_one_line(changes, words):
    with pytest.raises(UserError) as error:
        TrainSettings(**changes)
    assert words in str(error.value)
