"""Dry runs: a sharded step on shapes stores what the plan says, of the tiny and of the paper's model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from planned import LOAD, recipe_of

from laavit.cli import main
from laavit.engine.examples import Load
from laavit.engine.planning.dry_run import dry_run, fake_processes
from laavit.recipe import load_recipe
from laavit.registry import UserError


def ways(world: int, checkpointing: bool, **strategy: object) -> tuple[object, ...]:
    return world, checkpointing, {"name": "fsdp2", **strategy}


@pytest.mark.parametrize(
    ("world", "checkpointing", "strategy"),
    [
        ways(8, True, replicate=2, reshard_after_forward=False),
        pytest.param(*ways(1, False), marks=pytest.mark.slow),
        pytest.param(*ways(64, False), marks=pytest.mark.slow),
        pytest.param(*ways(64, True), marks=pytest.mark.slow),
    ],
)
def test_a_sharded_step_stores_what_the_plan_says(
    world: int, checkpointing: bool, strategy: dict, tiny_folder: Path
) -> None:
    train = {"steps": 10, "batch_size": 64, "precision": "bf16", "gradient_checkpointing": checkpointing}
    found = dry_run(recipe_of(tiny_folder, train=train, strategy=strategy), replace(LOAD, gpus=world))
    assert found["blocks"] == {"Qwen2_5_VLVisionBlock": 2, "Qwen2_5_VLDecoderLayer": 3}
    assert found["losses"] == ["ntp", "concept", "trajectory"] and found["without_gradient"] == []
    for part in ("weights", "gradients", "optimizer"):
        assert found[part] == found["planned"][part] > 0
    assert found["optimizer"] == 2 * found["gradients"] < 2 * found["weights"]
    assert found["peak"] <= found["planned"]["peak"]
    assert ("--strategy.replicate 2" in found["way"]) == ("replicate" in strategy)
    assert not dist.is_initialized()


def test_a_dry_run_stands_for_all_processes(tiny_folder: Path) -> None:
    with fake_processes(2), pytest.raises(UserError, match="start it without torchrun"):
        dry_run(recipe_of(tiny_folder), LOAD)
    assert not dist.is_initialized()


def test_the_command_tells_of_a_dry_run(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = tmp_path / "cfg.py"
    cfg.write_text(f"student = dict(name='hf', path={str(tiny_folder)!r})\ntrain = dict(batch_size=2)\n")
    assert main(["plan", str(cfg), "--dry-run", "--gpus", "3"]) == 0
    text = capsys.readouterr().out
    assert "process 0 of 3" in text and "3 x Qwen2_5_VLDecoderLayer" in text and "--strategy fsdp2" in text


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 8, 64])
def test_the_paper_s_model_is_sharded_as_planned(world: int) -> None:
    """3B: a step of the recipe of LaViT-3B, forward, backward and AdamW."""
    found = dry_run(load_recipe("zoo:lavit/lavit.py", ["--strategy", "fsdp2"]), Load(gpus=world))
    assert found["blocks"] == {"Qwen2_5_VLVisionBlock": 32, "Qwen2_5_VLDecoderLayer": 36}
    assert found["losses"] == ["ntp", "concept", "trajectory"] and found["without_gradient"] == []
    for part, count in (("weights", 3_769_310_208), ("gradients", 3_100_625_920), ("optimizer", 2 * 3_100_625_920)):
        assert found[part] == found["planned"][part]
        assert found[part] == pytest.approx(math.ceil(4 * count / world), rel=0.01)
    assert found["peak"] <= found["planned"]["peak"] <= 1.1 * found["peak"]
