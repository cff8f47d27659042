"""Registries: names, nearest names, and every named part of ``registry/`` resolving."""

from __future__ import annotations

import json

import pytest

from laavit.recipe import cards, checked, resolve
from laavit.registry import GATES, KINDS, UserError, nearest


def test_every_named_part_resolves_and_its_arguments_fit() -> None:
    required = dict.fromkeys(("path", "annotations", "root", "answers", "tower", "language"), "x")
    count = 0
    for kind, registry in KINDS.items():
        for card in cards(kind).values():
            cls = registry.find(card.type)
            missing = {key: value for key, value in required.items() if key not in card.args and key in cls_names(cls)}
            given = {**card.args, **missing}
            found = json.loads(json.dumps(checked(card.name, cls, given)))  # tuples are lists in a file
            assert card.description and card.source
            for name, value in given.items():  # of settings within settings, those that are left out have defaults
                both = isinstance(value, dict) and isinstance(found[name], dict)
                assert value.items() <= found[name].items() if both else value == found[name]
            count += 1
    assert count >= 15


def cls_names(cls: type) -> set[str]:
    import inspect

    return {name for name, p in inspect.signature(cls).parameters.items() if p.default is p.empty}


@pytest.mark.parametrize(
    ("given", "wanted"), [("cosin", "CosineGate"), ("Lineargate", "LinearGate"), ("ConstantGat", "ConstantGate")]
)
def test_an_unknown_class_names_the_nearest(given: str, wanted: str) -> None:
    with pytest.raises(UserError, match=rf"no gate is called '{given}'; allowed: .*did you mean '{wanted}'") as caught:
        GATES.find({"cosin": "CosinGate"}.get(given, given)) if given != "cosin" else GATES.find("cosin")
    assert "\n" not in str(caught.value)


def test_a_duplicate_name_raises_and_names_the_first_owner() -> None:
    with pytest.raises(
        UserError, match=r"CosineGate is already registered in gate at laavit\.gates; register it under"
    ):

        @GATES.register_module(name="CosineGate")
        class Other:
            pass


def test_nearest() -> None:
    assert nearest("warmpu", ["warmup", "paths"]) == "allowed: paths, warmup (did you mean 'warmup'?)"
    assert nearest("zzz", ["warmup"]) == "allowed: warmup" and nearest("a", []) == "allowed: none"


def test_a_component_is_a_name_or_a_class() -> None:
    assert resolve("gate", "gates", "hard") == {"type": "StepGate", "low": 0.0}
    assert resolve("gate", "gates", {"name": "hard", "warmup": 3}) == {"type": "StepGate", "low": 0.0, "warmup": 3}
    assert resolve("gate", "gates", {"type": "StepGate", "low": 0.5}) == {"type": "StepGate", "low": 0.5}
    for bad in (3, {}, {"name": "hard", "type": "StepGate"}, ["hard"]):
        with pytest.raises(UserError, match=r"^gate: got"):
            resolve("gate", "gates", bad)
    with pytest.raises(UserError, match=r"no kind of component is called 'gate'.*did you mean 'gates'"):
        cards("gate")
