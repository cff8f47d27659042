"""Processes of one machine, and runs whose gradients are kept."""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from combining import World
from mmengine.hooks import Hook
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from laavit.data.aligned import AlignedDataset, Collate
from laavit.engine import train
from laavit.engine.strategies import Strategy
from laavit.model import build_model
from laavit.recipe import Recipe, apply_overrides
from laavit.traces.store import TraceStore


class KeepGradients(Hook):
    """The gradient of every step before it is clipped, by parameter, whole."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def before_train(self, runner: Any) -> None:
        wrapper, guard = runner.optim_wrapper, runner.optim_wrapper.guard
        model = runner.model.module if hasattr(runner.model, "module") else runner.model

        def keep(loss: Tensor, norm: Tensor) -> Any:
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            whole = {n: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for n, g in grads.items()}
            self.steps.append({**whole, "norm": norm.clone()})
            return guard(loss, norm)

        wrapper.guard = keep


@dataclass
class Ran:
    """A run of two steps: the gradients of each, and every file of its last checkpoint."""

    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    files: dict[str, bytes]


@dataclass
class Runs:
    """Runs a recipe of two steps of four samples, in this process or in several.

    Args:
        folder: where to.
    """

    folder: Path
    number: int = field(default=0)

    def one(
        self, raw: dict[str, Any], strategy: Strategy | None = None, dtype: torch.dtype = torch.float64, **settings: Any
    ) -> Ran:
        """A run of this process, or its part in one of several."""
        self.number += 1  # the same in all processes
        recipe = Recipe(apply_overrides(raw, {"student.dtype": str(dtype).removeprefix("torch.")}))
        store = TraceStore(recipe.config["traces"]["path"])
        model = build_model(recipe, store.header).to(dtype)
        builder = model.student.builder(recipe.build("prompt"))
        dataset = AlignedDataset(recipe.build("data"), builder, model.named_targets, store)
        given = {"steps": 2, "batch_size": 4, "lr": 1e-3, "weight_decay": 0.1, "checkpoint_every": 0, **settings}
        made, keep = replace(recipe.build("train"), **given), KeepGradients()
        pad = model.student.backbone.tokenizer.pad_token_id
        collate = Collate(model.student.backbone.family, pad, made.shared_prefix, made.packing == "pack")
        run = self.folder / f"{self.number}-{os.environ.get('MASTER_PORT', 'alone')}"
        last = train(model, dataset, collate, made, run, raw, hooks=[keep], strategy=strategy)
        weights = {f"{path.stem}/{n}": t for path in last.glob("*.safetensors") for n, t in load_file(path).items()}
        files = {path.name: path.read_bytes() for path in last.iterdir() if path.suffix != ".safetensors"}
        del files["state.json"]
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("random/")}
        return Ran(keep.steps, weights, files)


def together(count: int, work: Callable[[], None]) -> None:
    """Run ``work`` in ``count`` processes as torchrun starts them; forked, which shares imports that take seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({name: str(value) for name, value in {**given, "MASTER_PORT": port}.items()})
            code = 1
            try:
                torch.set_num_threads(1)
                work()
                code = 0
            finally:  # pytest must not go on in a second process, whatever it was
                if code:
                    traceback.print_exception(sys.exc_info()[1])
                os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * count


def same(found: Ran, wanted: Ran, tolerance: float) -> None:
    """Gradients of both steps, weights and what the optimizer keeps, relative to each tensor's own norm."""
    for step, (ours, theirs) in enumerate(zip(found.gradients, wanted.gradients, strict=True)):
        close(ours, theirs, tolerance, f"gradient of step {step}")
    close(found.weights, wanted.weights, tolerance, "checkpoint")
    assert found.files == wanted.files


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float, what: str) -> None:
    assert ours.keys() == theirs.keys(), (what, ours.keys() ^ theirs.keys())
    for name, value in theirs.items():
        assert ours[name].shape == value.shape and ours[name].dtype == value.dtype, (what, name)
        # what is zero in exact arithmetic (a key's bias: softmax does not see it) is left to rounding
        bound = tolerance * max(float(value.double().norm()), 1e-6)
        assert float((ours[name].double() - value.double()).norm()) <= bound, (what, name)


@pytest.fixture(scope="session")
def spread_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("strategies") / "world")


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    yield Runs(tmp_path)


@pytest.fixture(scope="session")
def keep_gradients() -> type[KeepGradients]:
    return KeepGradients


@pytest.fixture(name="together")
def together_fixture() -> Callable[[int, Callable[[], None]], None]:
    return together


@pytest.fixture(name="same")
def same_fixture() -> Callable[[Ran, Ran, float], None]:
    return same
