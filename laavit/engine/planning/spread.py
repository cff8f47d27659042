"""Memory of one process under each way of spreading a model: all of it (single, ddp), or a share (fsdp2).

Shares are worked out as ``fully_shard`` makes them: every parameter is cut along its first dimension into equal parts,
the last ones padded, so each of W processes stores ceil(rows / W) rows of each, whatever part of them is its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from laavit.engine.shapes import bytes_of
from laavit.engine.strategies.fsdp2 import shard_blocks
from laavit.recipe import Recipe
from laavit.registry import UserError

if TYPE_CHECKING:
    from laavit.engine.planning.passes import Step


@dataclass(frozen=True)
class Way:
    """A way to run a recipe.

    Args:
        strategy: 'single', 'ddp' or 'fsdp2'. checkpointing: recompute activations. offload: weights, gradients and
            optimizer in the host's memory. reduce_every, reshard, replicate: of ``strategy.reduce_every``,
            ``strategy.reshard_after_forward`` and ``strategy.replicate``.
    """

    strategy: str
    checkpointing: bool = False
    offload: bool = False
    reduce_every: bool = False
    reshard: bool = True
    replicate: int = 1

    @property
    def name(self) -> str:
        parts = (self.strategy, "checkpointing" * self.checkpointing, "offload" * self.offload)
        return " + ".join(part for part in parts if part)

    @property
    def settings(self) -> str:
        """What a user writes for it."""
        given = {
            "offload": "cpu" * self.offload,
            "reshard_after_forward": "" if self.reshard else "False",
            "replicate": str(self.replicate) if self.replicate > 1 else "",
            "reduce_every": "True" * self.reduce_every,
        }
        options = "".join(f" --strategy.{name} {value}" for name, value in given.items() if value)
        return f"--strategy {self.strategy}{options} --train.gradient_checkpointing {self.checkpointing}"

    def shares(self, gpus: int) -> int:
        """Among how many processes a parameter is shared out."""
        return gpus // self.replicate if self.strategy == "fsdp2" else 1


def ways(own: Way, gpus: int) -> list[Way]:
    """The ways to run on so many GPUs, the simplest first, and a recipe's own, where it is another one.

    Those of fsdp2 have the arguments that the recipe gives it.
    """
    whole = "ddp" if gpus > 1 else "single"
    base = own if own.strategy == "fsdp2" else Way("fsdp2")
    shared = [replace(base, checkpointing=each, offload=False) for each in (False, True)] if gpus > 1 else []
    last = replace(base, checkpointing=True, offload=True)
    found = [Way(whole), Way(whole, True), *shared, last]
    return found if own in found else [*found, own]


def own_way(recipe: Recipe, gpus: int) -> Way:
    """The way that a recipe asks for; without a strategy 'single' for one GPU, 'ddp' for several.

    A strategy of the user's own is taken to hold everything in every process.

    Raises:
        UserError: its strategy does not fit so many processes.
    """
    checkpointing = bool(recipe.config["train"]["gradient_checkpointing"])
    if not recipe.has("strategy"):
        return Way("ddp" if gpus > 1 else "single", checkpointing)
    try:
        recipe.build("strategy").check(recipe.build("train"), torch.device("cuda"), gpus)
    except UserError as error:
        raise UserError(f"--gpus {gpus}: {error}") from None
    given = recipe.config["strategy"]
    if given["type"] != "FSDP2":
        return Way("ddp" if gpus > 1 else "single", checkpointing)
    options = given["reduce_every"], given["reshard_after_forward"], given["replicate"]
    return Way("fsdp2", checkpointing, given["offload"] == "cpu", *options)


def share(parameter: torch.Tensor, world: int, size: int | None = None) -> int:
    """Bytes that one of ``world`` processes stores of a parameter. size: of an element; None is its own."""
    rows = math.ceil(parameter.shape[0] / world)
    return rows * math.prod(parameter.shape[1:]) * (size or parameter.element_size())


def blocks_and_rest(model: nn.Module) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
    """The parameters that are gathered together: those of each block, and all others."""
    blocks = [list(block.parameters()) for block in shard_blocks(model)]
    inside = {id(p) for block in blocks for p in block}
    return blocks, [p for p in model.parameters() if id(p) not in inside]


class Reduction:
    """What gradients take under fsdp2, as they come and go: whole until the last of their block is there, then once
    more in float32 in the buffer that is summed, and from then on a share.

    Args:
        shares: processes among which a parameter is shared out; None where shares wait in the host's memory.

    Attributes:
        peak: the most bytes of gradients and of everything else in a step beside weights and optimizer.
    """

    def __init__(self, model: nn.Module, shares: int | None) -> None:
        blocks, rest = blocks_and_rest(model)
        self.shares, self.peak = shares, 0
        self._groups = [{id(p): p for p in group if p.requires_grad} for group in (*blocks, rest)]
        self._group = {key: number for number, group in enumerate(self._groups) for key in group}
        self._there: list[set[int]] = [set() for _ in self._groups]
        self._shared: set[int] = set()
        self._whole = self._parts = 0

    def look(self, live: int) -> None:
        """See ``laavit.engine.shapes.Exchange``."""
        self.peak = max(self.peak, live + self._whole + self._parts)

    def arrived(self, parameter: torch.Tensor, live: int) -> None:
        """See ``laavit.engine.shapes.Exchange``; ``parameter`` is in the dtype in which the model computes."""
        number = self._group[id(parameter)]
        group, there = self._groups[number], self._there[number]
        if id(parameter) in there:
            return
        there.add(id(parameter))
        self._whole += _bytes([parameter], None)
        if len(there) == len(group):
            self.look(live + _bytes(group.values(), 4))
            self._whole -= _bytes(group.values(), None)
            if self.shares is not None and number not in self._shared:
                self._parts += sum(share(p, self.shares, 4) for p in group.values())
            self._shared.add(number)
            there.clear()


def late_reduction(model: nn.Module, shares: int) -> tuple[int, int]:
    """``Step.reduced`` when the last gradients come and all else has been exchanged: activations are not in it."""
    exchanged, learned = last_exchanged(model), [p for p in _distinct(model.parameters()) if p.requires_grad]
    return exchanged + sum(share(p, shares, 4) for p in learned), exchanged


def last_exchanged(model: nn.Module) -> int:
    """The gradients of the largest block, or of what is in none, and float32 once more in the buffer that is summed."""
    blocks, rest = blocks_and_rest(model)
    learning = [[p for p in group if p.requires_grad] for group in (*blocks, rest)]
    return max((_bytes(group, None) + _bytes(group, 4) for group in learning), default=0)


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
      way, first as one buffer. All blocks, where they are kept after the forward pass.
    * exchanged: a block's gradients as they come and in float32 in the buffer that is summed; between micro-batches the
      gradients of the whole model, unless ``reduce_every``.
    * peak: an upper bound, since what is gathered is taken at its highest throughout.

    Args:
        step: of a model that computes in the precision by itself, its gradients followed by ``Reduction``.
    """
    trainable, shares = [p for p in model.parameters() if p.requires_grad], way.shares(gpus)
    size = 2 if precision == "bf16" else None
    blocks, rest = blocks_and_rest(model)
    largest = max((_bytes(block, size) for block in blocks), default=0)
    gathered = 2 * largest if way.reshard else largest + _bytes((p for block in blocks for p in block), size)
    learning = [[p for p in group if p.requires_grad] for group in (*blocks, rest)]
    exchanged = max((_bytes(group, size) + _bytes(group, 4) for group in learning), default=0)
    held = _bytes(trainable, 4) if accumulate > 1 and not way.reduce_every else 0
    parts = {
        "weights": sum(share(p, shares) for p in _distinct(model.parameters())),
        "gradients": sum(share(p, shares) for p in _distinct(trainable)),
        "optimizer": 2 * sum(share(p, shares) for p in _distinct(trainable)),
    }
    host = sum(parts.values()) if way.offload else 0
    if way.offload:
        parts = dict.fromkeys(parts, 0)
    parts |= {"exchanged": exchanged + held, "gathered": _bytes(rest, size) + gathered}
    peak = parts["weights"] + parts["optimizer"] + held + parts["gathered"] + step.reduced[way.offload]
    return {**parts, "activations": step.activations, "host": host, "peak": peak}


def _distinct(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters}.values())


def _bytes(parameters: Iterable[torch.Tensor], size: int | None) -> int:
    """Bytes of whole parameters, in elements of ``size`` bytes; None is their own."""
    return sum(p.numel() * (size or p.element_size()) for p in {id(p): p for p in parameters}.values())


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
