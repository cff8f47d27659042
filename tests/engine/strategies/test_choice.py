"""A strategy is chosen before the first step, and refuses what it does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laavit.engine.strategies import DDP, FSDP2, Single, shard_blocks, strategy_for
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


def test_shares_that_do_not_fit_are_refused(lab) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"strategy.replicate: got 3, which does not divide this run's 4 processes"):
        FSDP2(replicate=3).check(lab.settings(), cpu, 4)
    with pytest.raises(UserError, match=r"strategy.offload: got 'cpu', and the model is on the CPU already"):
        FSDP2(offload="cpu").check(lab.settings(), cpu, 2)
    FSDP2(offload="cpu", replicate=2).check(lab.settings(), torch.device("cuda", 0), 4)
    with pytest.raises(UserError, match=r"strategy.offload: .*none.*gpu"):
        Recipe({"strategy": {"name": "fsdp2", "offload": "gpu"}})


def test_blocks_are_the_members_of_the_outermost_lists() -> None:
    layer = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    model = nn.ModuleDict({"a": nn.ModuleList([layer, nn.Linear(2, 2), nn.Identity()]), "head": nn.Linear(2, 2)})
    assert shard_blocks(model) == [layer, model["a"][1]]
