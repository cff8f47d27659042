"""How a run of several processes begins, and that none waits for another: unequal paths, weights that are handed out.

A process that waits for ever fails its test: all of them are ended after ``LIMIT`` seconds.
"""

from __future__ import annotations

import gc
import shutil
import signal
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from combining import STUDENTS, Cell, World
from processes import launch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from laavit.backbones.loading import shapes_alone
from laavit.commands.export import export_run
from laavit.commands.train import train_recipe
from laavit.data.aligned import AlignedDataset, Collate
from laavit.engine import train
from laavit.engine.distributed import process_group, rank_and_world
from laavit.engine.hooks.gradient_norms import named_parts
from laavit.engine.sampler import permutation
from laavit.engine.settings import TrainSettings
from laavit.engine.strategies import DDP, FSDP2, Strategy
from laavit.engine.strategies.handing import without_weights
from laavit.files import read_object
from laavit.model import LaViT, build_model
from laavit.recipe import Recipe, apply_overrides
from laavit.registry import UserError
from laavit.structures import Sample

LIMIT = 60
#: targets that need no trace, and none at all
PLAIN = Cell("qwen2_5_vl", "learned", "cosine", ())
GIVEN = {"steps": 2, "batch_size": 4, "lr": 1e-3, "checkpoint_every": 0, "log_every": 1}


def limited(work: Callable[[], None], count: int = 2) -> None:
    """``work`` in so many processes, each of which ends after ``LIMIT`` seconds."""

    def one(rank: int) -> None:
        signal.alarm(LIMIT)
        with process_group(torch.device("cpu")):
            work()

    assert launch(one, count) == [0] * count


def trained(
    raw: dict[str, Any], run: Path, strategy: Strategy | None, samples: Sequence[Sample] | None = None, **settings: Any
) -> dict[str, Tensor]:
    """The learned parameters after two steps of four samples, whole, in float64."""
    recipe = Recipe(apply_overrides(raw, {"student.dtype": "float64"}))
    model = build_model(recipe, {}).double()
    samples = recipe.build("data") if samples is None else samples
    dataset = AlignedDataset(samples, model.student.builder(recipe.build("prompt")), model.named_targets)
    made = replace(recipe.build("train"), **{**GIVEN, **settings})
    collate = Collate(model.student.backbone.family, model.student.backbone.tokenizer.pad_token_id, made.shared_prefix)
    collate = replace(collate, pack=made.packing == "pack")
    train(model, dataset, collate, made, run, raw, strategy=strategy)
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p.data for n, p in model.trainable_parameters()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-8) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert float((ours[name] - value).norm()) <= tolerance * max(1.0, float(value.norm())), name


def compare(
    tmp_path: Path, raw: dict[str, Any], strategies: Sequence[Strategy], samples: Any = None, **more: Any
) -> None:
    """Two processes against one."""
    wanted = trained(raw, tmp_path / "one", None, samples, **more)

    def work() -> None:
        for number, strategy in enumerate(strategies):
            equal(trained(raw, tmp_path / f"{number}", strategy, samples, **more), wanted)

    limited(work)


def without_images(world: World, raw: dict[str, Any]) -> list[Sample]:
    """Four samples of which two, those of one process, have no image."""
    samples = list(Recipe(raw).build("data"))
    return [replace(each, images=()) if place in (1, 2) else each for place, each in enumerate(samples)]


def text_only_first(samples: list[Sample], seed: int = 0) -> list[Sample]:
    """In the order in which the first process of two gets the ones without images in the first step."""
    order = permutation(seed, 0, len(samples))
    ranked = sorted(samples, key=lambda sample: bool(sample.images))
    placed: list[Sample | None] = [None] * len(samples)
    for sample, place in zip(ranked, order, strict=True):
        placed[int(place)] = sample
    return [each for each in placed if each is not None]


@pytest.mark.parametrize("freeze", [["vision"], []])
def test_a_process_without_images_keeps_nobody_waiting(spread_world: World, tmp_path: Path, freeze: list[str]) -> None:
    raw = apply_overrides(spread_world.recipe(PLAIN), {"student.freeze": freeze, "traces": {"path": None}})
    samples = text_only_first(without_images(spread_world, raw))
    assert [bool(each.images) for each in samples].count(False) == 2
    more = {"gradient_checkpointing": True} if not freeze else {}
    compare(tmp_path, raw, [FSDP2(), DDP()], samples, **more)


@pytest.mark.slow
@pytest.mark.parametrize("student", list(STUDENTS))
def test_without_images_in_every_family(spread_world: World, tmp_path: Path, student: str) -> None:
    raw = spread_world.recipe(replace(PLAIN, student=student))
    raw = apply_overrides(raw, {"student.freeze": [], "traces": {"path": None}})
    if "lora" in raw["student"]:
        raw["student"]["lora"]["dropout"] = 0.0
    compare(tmp_path, raw, [FSDP2()], text_only_first(without_images(spread_world, raw)))


def test_no_images_and_shared_beginnings_are_refused(spread_world: World, tmp_path: Path) -> None:
    raw = apply_overrides(spread_world.recipe(PLAIN), {"traces": {"path": None}})
    samples = without_images(spread_world, raw)

    def work() -> None:
        with pytest.raises(UserError, match=r"shared_prefix: 2 of 4 samples have no image.*'ddp'"):
            trained(raw, tmp_path / "run", FSDP2(), samples, shared_prefix=True)
        assert not (tmp_path / "run").exists()

    limited(work)


@pytest.mark.parametrize("packing", ["none", pytest.param("pack", marks=pytest.mark.slow)])
def test_unequal_numbers_of_fed_back_latents(spread_world: World, tmp_path: Path, packing: str) -> None:
    """Each is a pass of its own; a process whose samples have few of them takes as many passes."""
    raw = spread_world.recipe(replace(PLAIN, latents="feedback"))
    raw = apply_overrides(raw, {"latents": {"name": "feedback", "count": [1, 4]}, "traces": {"path": None}})
    layout = Recipe(raw).build("latents").layout
    samples = list(Recipe(raw).build("data"))
    few = [f"few{n}" for n in range(99) if layout.count_of(f"few{n}") == 1]
    many = [f"many{n}" for n in range(99) if layout.count_of(f"many{n}") == 4]
    ids = [few[0], few[1], many[0], many[1]]
    renamed = [replace(each, id=key, images=each.images) for each, key in zip(samples, ids, strict=True)]
    order = permutation(0, 0, 4)
    placed = [renamed[int(place)] for place in torch.tensor(order).argsort()]
    compare(tmp_path, raw, [FSDP2()], placed, packing=packing)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Whole copies of all parameters and buffers, those that no checkpoint holds among them."""
    found = [*model.named_parameters(), *model.named_buffers()]
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in found}


def handed(raw: dict[str, Any]) -> tuple[LaViT, dict[str, Tensor]]:
    """A model built as train does: with weights in process 0, with shapes alone in the others."""
    rank, _ = rank_and_world()
    with shapes_alone() if rank else nullcontext():
        model = build_model(Recipe(raw), {"width": 24, "settings": {}})
    settings = Recipe(raw).build("train")
    if rank and raw["student"].get("name") == "hf":
        assert without_weights(model) and model.student.backbone.weights_digest() is None
    FSDP2().wrap(model, settings, torch.device("cpu"))
    assert not without_weights(model)
    return model, tensors(model)


@pytest.mark.parametrize(
    "student", [pytest.param(name, marks=[pytest.mark.slow] * (name != "qwen2_5_vl")) for name in STUDENTS]
)
def test_weights_are_handed_out_bit_by_bit(spread_world: World, student: str) -> None:
    raw = spread_world.recipe(Cell(student, "learned_random", "cosine", ("concept",)))
    model = build_model(Recipe(raw), {"width": 24, "settings": {}})
    wanted = tensors(model)

    def work() -> None:
        spread, found = handed(raw)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        learns = {n for n, _ in spread.trainable_parameters()}
        assert learns == {n for n, _ in model.trainable_parameters()}

    limited(work)


def checkpoint(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "state.json"}


@pytest.mark.parametrize("kind", ["sharded", "consolidated"])
def test_a_run_has_the_same_bits_however_weights_come(
    spread_world: World, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by every process or handed out; and so it is with a run that goes on from its middle."""
    cell = Cell("lora" if kind == "sharded" else "qwen2_5_vl", "learned_random", "cosine", ("concept", "trajectory"))
    raw = spread_world.recipe(cell) | {"strategy": "fsdp2"}
    raw["train"] |= {"steps": 2, "checkpoint_every": 1, "checkpoint_format": kind}
    last = "checkpoints/iter_000002"
    built: list[bool] = []

    def work(folder: str, hands_out: bool, resume: bool) -> None:
        monkeypatch.setattr(FSDP2, "hands_out", hands_out)
        wrap = FSDP2.wrap
        monkeypatch.setattr(FSDP2, "wrap", lambda s, m, *more: built.append(without_weights(m)) or wrap(s, m, *more))
        train_recipe(Recipe(raw), tmp_path / folder, resume)
        assert built == [hands_out and rank_and_world()[0] > 0]

    def one(*given: Any) -> None:
        def run(rank: int) -> None:
            signal.alarm(LIMIT)
            # joined here so that the test can ask for the rank afterwards
            with process_group(torch.device("cpu")):
                work(*given)

        assert launch(run) == [0, 0]

    one("read", False, False)
    one("handed", True, False)
    wanted = checkpoint(tmp_path / "read" / last)
    assert checkpoint(tmp_path / "handed" / last) == wanted
    (tmp_path / "handed" / last / "state.json").unlink()
    one("handed", True, True)
    assert checkpoint(tmp_path / "handed" / last) == wanted
    told = [read_object(tmp_path / name / "environment.json") for name in ("handed", "read")]
    assert told[0]["student_weights_sha256"] == told[1]["student_weights_sha256"] is not None


def test_weights_beside_a_sharded_checkpoint_are_those_of_the_training(spread_world: World, tmp_path: Path) -> None:
    """Resuming and exporting refuse a student's folder whose frozen weights were changed since."""
    raw = spread_world.recipe(PLAIN)
    shutil.copytree(raw["student"]["path"], tmp_path / "student")
    raw["student"] |= {"path": str(tmp_path / "student")}
    raw["train"] |= {"steps": 2, "checkpoint_every": 1, "checkpoint_format": "sharded"}
    train_recipe(Recipe(raw), tmp_path / "run")
    middle = tmp_path / "run" / "checkpoints" / "iter_000001"
    export_run(tmp_path / "run", tmp_path / "before", middle)
    file = tmp_path / "student" / "model.safetensors"
    weights = load_file(file)
    learned = next(name for name in weights if "visual" not in name)
    save_file(weights | {learned: weights[learned] + 1}, file, {"format": "pt"})
    export_run(tmp_path / "run", tmp_path / "learned", middle)  # what was learned is in the checkpoint
    frozen = next(name for name in weights if "visual" in name)
    save_file(weights | {frozen: weights[frozen] + 1}, file, {"format": "pt"})
    told = r"do not learn have the SHA-256 \w{12}\.\.\., and it was trained with \w{12}\.\.\.: put"
    with pytest.raises(UserError, match=told):
        export_run(tmp_path / "run", tmp_path / "after", middle)
    (tmp_path / "run" / "checkpoints" / "iter_000002" / "state.json").unlink()
    with pytest.raises(UserError, match=told):
        train_recipe(Recipe(raw), tmp_path / "run", resume=True)
    save_file(weights, file, {"format": "pt"})
    train_recipe(Recipe(raw), tmp_path / "run", resume=True)


def test_nothing_keeps_whole_parameters_alive(spread_world: World) -> None:
    """Adapters beside a projector that learns in full: it is spread, too, and has a norm under its own name."""
    raw = spread_world.recipe(replace(PLAIN, student="lora"))
    raw["student"] |= {"freeze": ["tower"], "lora": {"rank": 2, "targets": ["decoder"]}}

    def work() -> None:
        model = build_model(Recipe(raw), {})
        adapters = model.student.adapters
        whole = {name: weakref.ref(parameter) for name, parameter in adapters.trained.items()}
        assert whole
        FSDP2().wrap(model, TrainSettings(), torch.device("cpu"))
        gc.collect()
        assert not [name for name, parameter in whole.items() if parameter() is not None]
        assert all(isinstance(parameter, DTensor) for parameter in adapters.trained.values())
        parts = named_parts(model)
        assert {len(parts["projector"]), len(parts["adapters"])} == {len(whole), len(adapters.parameters())}

    limited(work)
