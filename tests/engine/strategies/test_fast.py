"""The faster ways to compute a step, on a model that is spread over processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from combining import Cell, World

from laavit.engine import kernels
from laavit.engine.distributed import process_group
from laavit.engine.settings import TrainSettings
from laavit.engine.strategies import DDP, FSDP2
from laavit.registry import UserError

LAVIT = Cell("qwen2_5_vl", "learned", "cosine", ("concept", "trajectory"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"compile": True},
        {"compile": True, "gradient_checkpointing": True},
        {"loss_rows": 3, "gradient_checkpointing": True},
    ],
)
def test_the_gradients_are_the_same(
    spread_world: World, runs: Any, together: Any, same: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BACKEND", "aot_eager")
    raw = spread_world.recipe(LAVIT)
    wanted = runs.one(raw)

    def work() -> None:
        with process_group(torch.device("cpu")):
            for strategy in (DDP(), FSDP2()):
                same(runs.one(raw, strategy, **settings), wanted, 1e-9)

    together(2, work)


def test_kept_features_and_shares_of_a_tower_do_not_go_together() -> None:
    with pytest.raises(UserError, match=r"train\.cache_vision: with fsdp2 .* take traces\.vision_cache"):
        FSDP2().check(TrainSettings(cache_vision=64), torch.device("cpu"), 2)
