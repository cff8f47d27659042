"""Memory of one process under each way of spreading a model: all of it (single, ddp), or a share (fsdp2).

Shares are worked out as ``fully_shard`` makes them: every parameter is cut along its first dimension into equal parts,
the last ones padded, so each of W processes stores ceil(rows / W) rows of each, whatever part of them is its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from laavit.engine.planning.passes import Step
from laavit.engine.shapes import bytes_of
from laavit.engine.strategies.fsdp2 import shard_blocks
from laavit.recipe import Recipe


@dataclass(frozen=True)
class Way:
    """A way to run a recipe.

    Args:
        strategy: 'single', 'ddp' or 'fsdp2'. checkpointing: recompute activations. offload: weights, gradients and
            optimizer in the host's memory. reduce_every: of ``strategy.reduce_every``.
    """

    strategy: str
    checkpointing: bool = False
    offload: bool = False
    reduce_every: bool = False

    @property
    def name(self) -> str:
        parts = (self.strategy, "checkpointing" * self.checkpointing, "offload" * self.offload)
        return " + ".join(part for part in parts if part)

    @property
    def settings(self) -> str:
        """What a user writes for it."""
        offload = " --strategy.offload cpu" if self.offload else ""
        return f"--strategy {self.strategy}{offload} --train.gradient_checkpointing {self.checkpointing}"


def ways(gpus: int) -> list[Way]:
    """The ways to run on so many GPUs, the simplest first."""
    whole = "ddp" if gpus > 1 else "single"
    shared = [Way("fsdp2"), Way("fsdp2", True)] if gpus > 1 else []
    return [Way(whole), Way(whole, True), *shared, Way("fsdp2", True, True)]


def own_way(recipe: Recipe, gpus: int) -> Way:
    """The way that a recipe asks for; without a strategy 'single' for one GPU, 'ddp' for several."""
    checkpointing = bool(recipe.config["train"]["gradient_checkpointing"])
    given = recipe.config.get("strategy")
    if given is None or given["type"] != "FSDP2":
        return Way("ddp" if gpus > 1 else "single", checkpointing)
    return Way("fsdp2", checkpointing, given["offload"] == "cpu", given["reduce_every"])


def share(parameter: torch.Tensor, world: int, size: int | None = None) -> int:
    """Bytes that one of ``world`` processes stores of a parameter. size: of an element; None is its own."""
    rows = math.ceil(parameter.shape[0] / world)
    return rows * math.prod(parameter.shape[1:]) * (size or parameter.element_size())


def blocks_and_rest(model: nn.Module) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
    """The parameters that are gathered together: those of each block, and all others."""
    blocks = [list(block.parameters()) for block in shard_blocks(model)]
    inside = {id(p) for block in blocks for p in block}
    return blocks, [p for p in model.parameters() if id(p) not in inside]


def whole_memory(model: nn.Module, step: Step, gpus: int) -> dict[str, int]:
    """Bytes of a process that holds the whole model: single, or ddp, whose buckets are a copy of the gradients."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    buckets = bytes_of(trainable) if gpus > 1 else 0
    parts = {"weights": bytes_of(model.parameters()), "gradients": step.gradients, "optimizer": 2 * bytes_of(trainable)}
    parts |= {"exchanged": buckets, "gathered": 0, "activations": step.activations}
    # Gradients grow while activations go: both at their highest at once is more than there ever is.
    peak = parts["weights"] + parts["optimizer"] + buckets + step.peak
    return {**parts, "host": 0, "peak": peak}


def shared_memory(model: nn.Module, step: Step, gpus: int, way: Way, precision: str, accumulate: int) -> dict[str, int]:
    """Bytes of a process that holds a share (fsdp2).

    * gathered: what stands in no block, for the whole step, and two blocks: the one that runs, and the next one on its
      way, first as one buffer.
    * exchanged: a block's gradients as they come and in float32 in the buffer that is summed; between micro-batches the
      gradients of the whole model, unless ``reduce_every``.

    Args:
        step: of a model that computes in the precision by itself.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    size = 2 if precision == "bf16" else None
    blocks, rest = blocks_and_rest(model)
    largest = max((_bytes(block, size) for block in blocks), default=0)
    learning = [[p for p in group if p.requires_grad] for group in (*blocks, rest)]
    exchanged = max((_bytes(group, size) + _bytes(group, 4) for group in learning), default=0)
    if accumulate > 1 and not way.reduce_every:
        exchanged += _bytes(trainable, 4)
    parts = {
        "weights": sum(share(p, gpus) for p in _distinct(model.parameters())),
        "gradients": sum(share(p, gpus) for p in _distinct(trainable)),
        "optimizer": 2 * sum(share(p, gpus) for p in _distinct(trainable)),
    }
    host = sum(parts.values()) if way.offload else 0
    if way.offload:
        parts = dict.fromkeys(parts, 0)
    parts |= {"exchanged": exchanged, "gathered": _bytes(rest, size) + 2 * largest, "activations": step.activations}
    return {**parts, "host": host, "peak": sum(parts.values())}


def _distinct(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters}.values())


def _bytes(parameters: Iterable[nn.Parameter], size: int | None) -> int:
    """Bytes of whole parameters, in elements of ``size`` bytes; None is their own."""
    return sum(p.numel() * (size or p.element_size()) for p in _distinct(parameters))


@contextmanager
def computing_in(model: nn.Module, mode: Any, dtype: torch.dtype) -> Iterator[None]:
    """A shaped model whose parameters are of another dtype for a while, as fsdp2 gathers them."""
    known: dict[int, nn.Parameter] = {}
    before = [(m, name, p) for m in model.modules() for name, p in m.named_parameters(recurse=False)]
    for module, name, parameter in before:
        if id(parameter) not in known:
            with mode:
                other = torch.empty(parameter.shape, dtype=dtype)
            known[id(parameter)] = nn.Parameter(other, parameter.requires_grad)
        setattr(module, name, known[id(parameter)])
    try:
        yield
    finally:
        for module, name, parameter in before:
            setattr(module, name, parameter)
