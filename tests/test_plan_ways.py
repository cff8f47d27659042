"""Ways to run a recipe: shares, FLOPs, time, what fits, which lever frees how much, what stays on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from planned import LOAD, memory_of, plan_of, recipe_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from laavit.backbones import collate
from laavit.engine import plan as planning
from laavit.engine.flops import flop_counter
from laavit.engine.planning.batches import units
from laavit.engine.planning.machines import machine
from laavit.engine.planning.passes import about_images, prepared_targets
from laavit.engine.planning.speed import storage
from laavit.engine.planning.spread import blocks_and_rest, own_way, share, whole_memory
from laavit.engine.settings import TrainSettings
from laavit.engine.strategies import enable_gradient_checkpointing, shard
from laavit.model import build_model
from laavit.registry import UserError


@pytest.fixture
def processes() -> Iterator[Callable[[int], None]]:
    """Lets this process take itself for the first of so many."""
    yield lambda count: dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    dist.destroy_process_group()


def test_shares_are_those_of_fully_shard(tiny_folder: Path, processes: Callable[[int], None]) -> None:
    """What every process stores, the padding of the last shares included; and what is gathered together."""
    processes(3)
    model = build_model(recipe_of(tiny_folder), {"width": 32, "depth": 3})
    planned = {name: share(p, 3) for name, p in model.named_parameters()}
    blocks, rest = blocks_and_rest(model)
    counts = [sum(p.numel() for p in block) for block in blocks], sum(p.numel() for p in rest)
    assert len(blocks) == 2 + 3 and sum(counts[0]) + counts[1] == sum(p.numel() for p in model.parameters())
    shard(model, init_device_mesh("cpu", (3,)))
    groups = [
        module._get_fsdp_state()._fsdp_param_group for module in model.modules() if isinstance(module, FSDPModule)
    ]
    stored = {p._module_info.param_name for group in groups for p in group.fsdp_params}
    assert {name.rpartition(".")[2] for name in planned} >= stored
    padded = sum(p._sharded_param_data.numel() * 4 for group in groups for p in group.fsdp_params)
    assert padded == sum(planned.values()) > sum(p.numel() * 4 for p in model.parameters()) / 3


def test_ways_share_what_they_say(tiny_folder: Path) -> None:
    recipe = recipe_of(tiny_folder, train={"steps": 10, "batch_size": 8, "accumulate": 2})
    found = planning.make_plan(recipe, replace(LOAD, gpus=4))
    ddp, fsdp2, offload = (memory_of(found, way) for way in ("ddp", "fsdp2", "fsdp2 + checkpointing + offload"))
    for part in ("weights", "gradients", "optimizer"):
        assert ddp[part] / 4 <= fsdp2[part] < 1.1 * ddp[part] / 4 and offload[part] == 0
    assert offload["host"] == sum(fsdp2[part] for part in ("weights", "gradients", "optimizer"))
    assert fsdp2["exchanged"] > found["trainable_bytes"]  # whole gradients between micro-batches
    assert fsdp2["peak"] <= sum(fsdp2[part] for part in fsdp2 if part not in ("peak", "host"))
    assert [row["name"] for row in plan_of(tiny_folder)["ways"]] == [
        "single",
        "single + checkpointing",
        "fsdp2 + checkpointing + offload",
    ]


def test_what_a_recipe_gives_fsdp2_is_planned(tiny_folder: Path) -> None:
    """A share of each of two models, in every way of fsdp2; blocks that are kept; gradients exchanged each time."""
    strategy = {"name": "fsdp2", "reduce_every": True, "replicate": 2, "reshard_after_forward": False}
    train = {"steps": 10, "batch_size": 8, "accumulate": 2}
    found = planning.make_plan(recipe_of(tiny_folder, train=train, strategy=strategy), replace(LOAD, gpus=4))
    own = found["ways"][found["own"]]
    assert own["name"] == "fsdp2" and own["shares"] == 2 and len(found["ways"]) == 5
    assert own["settings"] == (
        "--strategy fsdp2 --strategy.reshard_after_forward False --strategy.replicate 2 --strategy.reduce_every True "
        "--train.gradient_checkpointing False"
    )
    memory = memory_of(found, "fsdp2")
    model = planning.shape_models(recipe_of(tiny_folder)).model
    assert memory["weights"] == sum(share(p, 2) for p in model.parameters())
    assert memory["gathered"] > memory_of(found, "ddp")["weights"]  # all of it, and a block on its way
    assert memory["exchanged"] < found["trainable_bytes"]
    assert own_way(recipe_of(tiny_folder, strategy={"name": "fsdp2"}), 4).shares(4) == 4
    timed = planning.timed({**found, "step": {**found["step"], "precision": "bf16"}}, machine("h100"), 1.0)
    arithmetic = sum(own["flops"].values()) / 989.5e12
    row = timed["ways"][timed["own"]]
    assert row["step_seconds"] == pytest.approx(arithmetic + found["total"]["trainable"] / 2 * 28 / 3.35e12)


def test_flops_are_those_of_a_real_step(tiny_folder: Path) -> None:
    """PyTorch's counter over a real forward and backward, images included; checkpointing computes again."""
    recipe, found = recipe_of(tiny_folder), plan_of(tiny_folder)
    plain, again = found["ways"][0]["flops"], found["ways"][1]["flops"]
    shaped = planning.shape_models(recipe)
    model = build_model(recipe, {"width": 32, "depth": 3}).train()
    item = shaped.example("student", LOAD)
    item = replace(item, vision={**item.vision, "pixel_values": torch.randn(item.vision["pixel_values"].shape)})
    for flops, checkpointing in ((plain, False), (again, True)):
        if checkpointing:
            enable_gradient_checkpointing(model)
        batch = collate(about_images(item, 4, 1), model.student.backbone.family, 0)
        batch.targets = prepared_targets(shaped, item, 4, LOAD)
        with flop_counter() as counter:
            losses = model(batch)
            forward = counter.get_total_flops()
            losses["loss"].backward()
        assert flops["forward"] == forward
        assert flops["backward"] + flops["recompute"] == counter.get_total_flops() - forward
    assert plain["recompute"] == 0 < again["recompute"] < again["forward"]


def test_time_fit_and_proposal(tiny_folder: Path) -> None:
    found = plan_of(tiny_folder, gpus=2)
    peaks = [row["memory"]["peak"] for row in found["ways"]]
    gpu = machine("H100")
    plain = planning.timed(plan_of(tiny_folder, gpus=2), gpu, 0.5)
    assert plain["assumed_share"] is None and "step_seconds" not in plain["ways"][0]  # the peak is of bf16
    found["step"]["precision"] = "bf16"
    timed = planning.timed(found, gpu, 0.5, memory=2 * max(peaks))
    assert timed["proposed"]["name"] == "ddp" and all(row["fits"] for row in timed["ways"])
    row = timed["ways"][1]
    arithmetic = sum(row["flops"].values()) / (989.5e12 * 0.5)
    assert row["step_seconds"] == pytest.approx(arithmetic + found["total"]["trainable"] * 28 / 3.35e12)
    assert row["hours"] == pytest.approx(10 * row["step_seconds"] / 3600) and row["mfu"] < 0.5
    assert timed["ways"][-1]["step_seconds"] is None  # the way to the host decides
    tight = planning.timed(found, gpu, 0.5, memory=peaks[0] * 1.05)
    assert (
        tight["ways"][0]["fits"] and tight["proposed"]["name"] != "ddp" and "too tight: ddp" in tight["proposed"]["why"]
    )
    none = planning.timed(found, None, 0.5, memory=min(peaks) / 2)
    assert none["proposed"]["name"] is None and not any(row["fits"] for row in none["ways"])


def test_levers_free_what_they_say(tiny_folder: Path) -> None:
    own = plan_of(tiny_folder, gpus=2)
    freed, peak = dict(planning.levers(own)), memory_of(own, "ddp")["peak"]
    assert list(freed.values()) == sorted(freed.values(), reverse=True)
    assert freed["train.gradient_checkpointing=True"] == peak - memory_of(own, "ddp + checkpointing")["peak"]
    assert freed["strategy=fsdp2"] == peak - memory_of(own, "fsdp2")["peak"]
    assert freed["train.accumulate=2"] == memory_of(own, "ddp")["activations"] // 2
    odd = {**own, "step": {**own["step"], "units": 3}}  # 3 samples divide into no 2 micro-batches
    assert not any("accumulate" in lever for lever, _ in planning.levers(odd))


@pytest.mark.slow
def test_levers_free_what_the_recipe_that_follows_them_has_less(tiny_folder: Path) -> None:
    """The tower, of which a tiny model is most, is left out."""
    train, cached = {"steps": 10, "batch_size": 8, "grouped": True}, {"vision_cache": "features"}
    load = replace(LOAD, gpus=2, questions=3)
    own = planning.make_plan(recipe_of(tiny_folder, train=train, traces=cached), load)
    freed, peak = dict(planning.levers(own)), memory_of(own, "ddp")["peak"]

    def after(**changes: Any) -> int:
        recipe = recipe_of(tiny_folder, train={**train, **changes}, traces=cached)
        passes = planning.passes_of(planning.shape_models(recipe), None, load)
        return peak - whole_memory(passes.shaped.model, passes.step(False), 2)["peak"]

    shared = freed["train.shared_prefix=True with train.grouped=True"]
    assert shared == pytest.approx(after(shared_prefix=True), rel=0.3) and shared > 0
    assert freed["train.accumulate=2"] == pytest.approx(after(accumulate=2), rel=0.3)
    assert own["run"]["samples"] == 10 * 8 * 3
    assert own["run"]["features"] == 10 * 8 * 64 * 32 * 4  # an image a group, 64 tokens, 32 wide


def test_storage_of_a_run() -> None:
    given = {"steps": 1000, "checkpoint_every": 100, "keep_last": 3}
    run = storage(70, 50, TrainSettings(**given), 4000, 9)
    assert run["checkpoint"] == 70 + 100 and run["kept"] == 3 and run["checkpoints"] == 4 * 170
    assert run["traces"] == 4000 * 9
    shards = storage(70, 50, TrainSettings(**given, checkpoint_format="sharded"), 4000, None)
    assert shards["checkpoint"] == 150 and shards["checkpoints"] == 3 * 150 + 170  # the last one is whole
    one = storage(70, 50, TrainSettings(steps=9, checkpoint_every=0, checkpoint_format="sharded"), 9, None)
    assert one["format"] == "consolidated" and one["checkpoints"] == one["checkpoint"] == 170


def test_a_budget_of_tokens_is_a_number_of_samples(tiny_folder: Path) -> None:
    """Samples of 95 tokens; shared, a group of 3 has 64 + 15 and what comes before the image once."""
    item = planning.shape_models(recipe_of(tiny_folder)).example("student", LOAD)
    length, begin = len(item.input_ids), item.spans[0].end
    settings = TrainSettings(tokens=10 * length + 1, accumulate=2)
    assert units(settings, replace(LOAD, gpus=2), item) == (10, 3)  # of 4 micro-batches the largest has 3
    shared = replace(settings, grouped=True, shared_prefix=True, tokens=2 * (begin + 3 * (length - begin)))
    assert units(shared, replace(LOAD, questions=3), item) == (2, 1)
    with pytest.raises(UserError, match=rf"train.tokens: got {2 * length}; a sample is taken to have {length} tokens"):
        units(replace(settings, tokens=2 * length), replace(LOAD, gpus=2), item)
    recipe = recipe_of(tiny_folder, train={"steps": 10, "tokens": 3 * length, "batch_size": 7})
    passes = planning.passes_of(planning.shape_models(recipe), None, LOAD)
    assert len(passes.items) == 3
