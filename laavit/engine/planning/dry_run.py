"""A whole step of a recipe under fsdp2 with any number of processes, on shapes: no weights, no network, one process.

PyTorch's fake process group stands for the others: collectives give tensors of the right shapes. What is seen is
process 0, whose shares are the largest.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from laavit.backbones.base import collate
from laavit.engine.examples import Load
from laavit.engine.optim import build_adamw, unique_parameters
from laavit.engine.planning.batches import Passes
from laavit.engine.planning.models import shape_models
from laavit.engine.planning.passes import checkpoint, prepared_targets
from laavit.engine.planning.spread import Way, computing_in, own_way, shared_memory
from laavit.engine.settings import TrainSettings
from laavit.engine.shapes import Meter
from laavit.engine.strategies import FSDP2, shard, shard_blocks
from laavit.recipe import Recipe
from laavit.registry import UserError


@contextmanager
def fake_processes(world: int) -> Iterator[None]:
    """This process as the first of ``world``, whose others are not there.

    Raises:
        UserError: it already is one of several.
    """
    if dist.is_initialized():
        raise UserError("a dry run stands for all processes by itself: start it without torchrun")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


class ShardMeter(Meter):
    """Counts as ``Meter``, and sees that fully_shard empties the storages of gathered weights and fills them again."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("fsdp", "c10d"):  # before each exchange the last block's weights have gone
            for key, (storage, size) in list(self._sizes.items()):  # a storage may go meanwhile
                known = storage()
                if known is not None and known.nbytes() != size:
                    self.live += known.nbytes() - size
                    self._sizes[key] = storage, known.nbytes()
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._seen:
            self._sizes[storage._cdata] = weakref.ref(storage), storage.nbytes()
        super()._count(storage)

    def _release(self, key: int, size: int) -> None:
        super()._release(key, self._sizes.pop(key, (None, size))[1])


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes that this process stores of sharded tensors, their padding included."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in local)}.values())


def dry_run(recipe: Recipe, load: Load) -> dict[str, Any]:
    """Shard the recipe's model over ``load.gpus`` processes and run a step of one sample a process.

    Precision, checkpointing and what the recipe's strategy says of ``reshard_after_forward`` and ``replicate`` are the
    recipe's. Of ``offload`` nothing is seen: shapes know one device.

    Returns:
        ``world``, ``way``, ``blocks`` (classes of what is gathered by itself, and how many), ``losses``, ``weights``,
        ``gradients``, ``optimizer`` and ``peak`` in bytes, and ``planned``: the same by ``shared_memory``.

    Raises:
        UserError: see ``shape_models``, ``fake_processes``, ``own_way``.
    """
    settings: TrainSettings = recipe.build("train")
    settings = replace(settings, batch_size=load.gpus, tokens=0, accumulate=1)
    own = own_way(recipe, load.gpus)
    way = own if own.strategy == "fsdp2" else Way("fsdp2", settings.gradient_checkpointing)
    way = replace(way, offload=False)
    shaped = shape_models(recipe)
    model, mode, backbone = shaped.model, shaped.mode, shaped.model.student.backbone
    item = shaped.example("student", load)
    alone = Passes(shaped, load, [item], way.shares(load.gpus))
    with computing_in(model, mode, torch.bfloat16 if settings.precision == "bf16" else torch.float32):
        step = alone.step(way.checkpointing, "fp32", accumulate=1)
    planned = shared_memory(model, step, load.gpus, way, settings.precision, 1)
    blocks = dict[str, int]()
    for block in shard_blocks(model):
        blocks[type(block).__name__] = blocks.get(type(block).__name__, 0) + 1
    batch = collate([item], backbone.family, 0, settings.shared_prefix, settings.packing == "pack")
    batch.targets = prepared_targets(shaped, item, 1, load)
    checkpoint(model, way.checkpointing)
    with fake_processes(load.gpus):
        mesh = FSDP2(replicate=way.replicate).mesh("cpu", load.gpus)  # of real numbers
        with mode:
            shard(model, mesh, settings.precision, way.reshard)
        found = _step(model, batch, settings, mode)
    return {"world": load.gpus, "way": way.settings, "blocks": blocks, **found, "planned": planned}


def _step(model: nn.Module, batch: Any, settings: TrainSettings, mode: Any) -> dict[str, Any]:
    """Forward, backward and optimizer of a sharded model."""
    assert isinstance(model, FSDPModule), "shard has been here"
    meter = ShardMeter()
    meter.ignore([p.to_local() for p in model.parameters() if isinstance(p, DTensor)] + list(model.buffers()))
    with meter:
        logged = model(batch)
        logged["loss"].backward()
    named = unique_parameters((n, p) for n, p in model.named_parameters() if p.requires_grad)
    gradients = [p.grad for _, p in named if p.grad is not None]
    unreached = [name for name, p in named if p.grad is None]
    optimizer = build_adamw(named, settings)
    with mode:
        optimizer.step()
    states = [s for state in optimizer.state.values() for key, s in state.items() if key != "step"]
    weights = stored(model.parameters())
    found = {"weights": weights, "gradients": stored(gradients), "optimizer": stored(states)}
    losses = [name for name in logged if name != "loss" and not name.startswith("gamma")]
    peak = weights + found["optimizer"] + meter.peak
    return {**found, "peak": peak, "losses": losses, "without_gradient": unreached}
