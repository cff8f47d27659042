"""The same gradients and weights however a model is spread: gate, targets, unequal images, several of a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from combining import STUDENTS, Cell, World, target_of

from laavit.engine.distributed import process_group
from laavit.engine.strategies import DDP, FSDP2, Strategy
from laavit.recipe import apply_overrides, cards

LAVIT = Cell("qwen2_5_vl", "learned", "cosine", ("concept", "trajectory"))
FROZEN = {"student.freeze": ["vision", "embeddings"]}


@dataclass
class Way:
    """How a run is spread, and what of the recipe is another one; ``more`` also holds for the run it is compared with.

    ``settings`` do not change the gradient.
    """

    strategy: Strategy
    settings: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64


def compare(
    runs: Any,
    together: Any,
    same: Any,
    count: int,
    raw: Mapping[str, Any],
    ways: Mapping[str, Way],
    exact: float = 1e-9,
) -> None:
    """Each way in ``count`` processes against a plain run of one."""
    wanted: dict[str, Any] = {}
    for way in ways.values():
        if (key := f"{way.dtype} {way.more}") not in wanted:
            wanted[key] = runs.one(apply_overrides(dict(raw), way.more), dtype=way.dtype)

    def work() -> None:
        with process_group(torch.device("cpu"), always=count == 1):
            for name, way in ways.items():
                try:
                    given = apply_overrides(dict(raw), way.more)
                    found = runs.one(given, way.strategy, way.dtype, **way.settings)
                    same(found, wanted[f"{way.dtype} {way.more}"], exact if way.dtype == torch.float64 else 1e-5)
                except Exception as error:
                    raise AssertionError(f"{count} processes: {name}") from error

    together(count, work)


def test_two_processes_equal_one(spread_world: World, runs: Any, together: Any, same: Any) -> None:
    ways = {
        "ddp, accumulated": Way(DDP(), {"accumulate": 2}),
        "fsdp2": Way(FSDP2()),
        "fsdp2, checkpointed, accumulated, float32": Way(
            FSDP2(), {"accumulate": 2, "gradient_checkpointing": True}, dtype=torch.float32
        ),
        "fsdp2, kept whole, exchanged each, tables frozen but for latents": Way(
            FSDP2(reshard_after_forward=False, reduce_every=True), {"accumulate": 2}, FROZEN
        ),
    }
    compare(runs, together, same, 2, spread_world.recipe(LAVIT), ways)


def test_shares_of_one_process(spread_world: World, runs: Any, together: Any, same: Any) -> None:
    compare(runs, together, same, 1, spread_world.recipe(LAVIT), {"fsdp2": Way(FSDP2(), {"accumulate": 4})})


@pytest.mark.slow
def test_four_processes_equal_one(spread_world: World, runs: Any, together: Any, same: Any) -> None:
    ways = {
        "ddp": Way(DDP()),
        "fsdp2": Way(FSDP2()),
        "fsdp2, float32": Way(FSDP2(), dtype=torch.float32),
        "fsdp2, checkpointed": Way(FSDP2(), {"gradient_checkpointing": True}),
        "fsdp2, two whole models": Way(FSDP2(replicate=2)),
        "fsdp2, tables frozen but for latents": Way(FSDP2(), more=FROZEN),
    }
    compare(runs, together, same, 4, spread_world.recipe(LAVIT), ways)


@pytest.mark.slow
def test_all_targets_and_latents(spread_world: World, runs: Any, together: Any, same: Any) -> None:
    """Every target that does not compare samples of a batch; latents that are emitted, and read in several passes."""
    parts = {name: target_of(name) for name in cards("targets")}
    names = [n for n, part in parts.items() if not part.needs_boxes and getattr(part, "min_batch", 1) == 1]
    raw = spread_world.recipe(Cell("qwen2_5_vl", "learned", "cosine", tuple(names)))
    checkpointed = {"gradient_checkpointing": True, "accumulate": 2}
    ways = {"all targets": Way(FSDP2()), "all targets, checkpointed": Way(FSDP2(), checkpointed)}
    for latents in ("emitted", "feedback"):
        more = {"latents": latents, "targets": {"concept": "concept", "trajectory": "trajectory"}}
        ways |= {latents: Way(FSDP2(), more=more), f"{latents}, checkpointed": Way(FSDP2(), checkpointed, more)}
    pair = {"targets": {"concept": "concept", "trajectory": "trajectory"}}
    ways["packed"] = Way(FSDP2(), {"packing": "pack", "gradient_checkpointing": True}, pair)
    compare(runs, together, same, 2, raw, ways)


@pytest.mark.slow
def test_shared_beginnings(spread_world: World, runs: Any, together: Any, same: Any) -> None:
    """Read in two passes whose keys are handed over beside the blocks' outputs, against samples read one by one."""
    raw = spread_world.recipe(LAVIT)
    data = spread_world._annotate("alike", [("0",)] * 4)
    raw["data"]["annotations"], raw["traces"]["path"] = str(data), str(spread_world.store("qwen2_5_vl", data))
    ways = {  # the cosines of rotary embeddings are float32 in any case, and here their last bit depends on the shape
        "shared": Way(FSDP2(), {"shared_prefix": True}, dtype=torch.float32),
        "shared, checkpointed": Way(
            FSDP2(), {"shared_prefix": True, "gradient_checkpointing": True}, {}, torch.float32
        ),
    }
    compare(runs, together, same, 2, raw, ways)


@pytest.mark.slow
@pytest.mark.parametrize("student", list(STUDENTS))
def test_every_family(spread_world: World, runs: Any, together: Any, same: Any, student: str) -> None:
    """Tower and projector learn, too; in bf16 it runs, and near the run that autocasts."""
    raw = spread_world.recipe(Cell(student, "learned", "cosine", ("concept", "trajectory")))
    if "lora" in raw["student"]:  # each process draws a dropout of its own
        raw["student"]["lora"]["dropout"] = 0.0
    ways = {
        "frozen tower": Way(FSDP2()),
        "all learns, checkpointed": Way(FSDP2(), {"gradient_checkpointing": True}, {"student.freeze": []}),
    }
    compare(runs, together, same, 2, raw, ways, exact=1e-6)  # some norms compute in float32 whatever they are given
    half = runs.one(raw, dtype=torch.float32, precision="bf16")

    def work() -> None:
        found = runs.one(raw, FSDP2(), torch.float32, precision="bf16")
        assert {t.dtype for t in found.gradients[0].values()} == {torch.float32}
        ours, theirs = (torch.cat([g.flatten() for n, g in sorted(run.gradients[0].items())]) for run in (found, half))
        assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.98

    together(2, work)
