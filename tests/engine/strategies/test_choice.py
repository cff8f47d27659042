"""A strategy is chosen before the first step, and refuses what it does not fit."""

from __future__ import annotations

import pytest

from laavit.engine.strategies import DDP, Single, strategy_for
from laavit.recipe import Recipe
from laavit.registry import UserError


def test_the_number_of_processes_chooses() -> None:
    assert isinstance(strategy_for(None, 1), Single) and isinstance(strategy_for(None, 2), DDP)
    given = Single()
    assert strategy_for(given, 2) is given


def test_a_recipe_names_one() -> None:
    assert isinstance(Recipe({"strategy": "ddp"}).build("strategy"), DDP)
    assert not Recipe({}).has("strategy")
    with pytest.raises(UserError, match=r"strategy: no strategy is called 'dpp'; allowed: .*did you mean 'ddp'"):
        Recipe({"strategy": "dpp"})


def test_the_wrong_number_of_processes_is_refused(lab, tmp_path) -> None:
    with pytest.raises(UserError, match="strategy: ddp copies the model to several processes, and this run has one"):
        lab.run(tmp_path, strategy=DDP())
    assert not list(tmp_path.iterdir())  # nothing was written
    with pytest.raises(UserError, match="strategy: single trains in one process, and 2 were started"):
        Single().check(lab.settings(), None, 2)
