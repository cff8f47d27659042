"""Every process holds a share of weights, gradients and optimizer's state (ZeRO 3, arXiv 1910.02054): ``fully_shard``.

A block's weights are gathered before it runs, forward and backward, and let go afterwards; what stands in no block
(embeddings, head, projector, latents' rows, alignment heads) is gathered for the whole step.

Two things hold only because of how the model is built, and are tested: whatever reads weights does so inside the
model's own ``forward``, called through ``__call__``; and attention rows, which leave a block beside its output, go back
through it while the weights are gathered, since autograd runs what was computed last first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from laavit.engine.strategies.base import Strategy
from laavit.engine.strategies.handing import handing_out
from laavit.registry import STRATEGIES, UserError

if TYPE_CHECKING:
    from laavit.engine.settings import TrainSettings


def shard_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of decoder, vision tower and whatever else has a list of them, in the model's order.

    These are the members of the outermost ``nn.ModuleList``s: all families keep their layers so.
    """
    return [block for _, block in _blocks(model, "")]


def _blocks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if not isinstance(module, nn.ModuleList):
            yield from _blocks(child, f"{path}{name}.")
        elif any(True for _ in child.parameters()):
            yield f"{path}{name}", child


def precision_policy(precision: str) -> MixedPrecisionPolicy:
    """'bf16': float32 shards are gathered in bf16 and gradients summed in float32; otherwise all as it is.

    No inputs are cast: a batch has targets that are to stay exact, and a block reads what the one before it gave.
    """
    if precision == "bf16":
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy(cast_forward_inputs=False)


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    precision: str = "fp32",
    reshard_after_forward: bool = True,
    offload: bool = False,
    give: Callable[[nn.Module], None] | None = None,
) -> None:
    """Put shares of parameters (``DTensor``s of the same names) in the place of a model's own, block by block.

    Works on the meta device and in a fake process group as well.

    Args:
        mesh: of one dimension; or of two, of which the first replicates. give: called with each block, and with the
            rest, before it is shared out (``handing_out``). The others are as of ``FSDP2``.
    """
    few_rows = {name: p.few_rows for name, p in model.named_parameters() if hasattr(p, "few_rows")}
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision_policy(precision)}
    options["offload_policy"] = CPUOffloadPolicy() if offload else OffloadPolicy()
    for block in shard_blocks(model):
        if give is not None:
            give(block)
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
        block.register_forward_pre_hook(_hide, prepend=True, with_kwargs=True)  # before fully_shard's own
        block.register_forward_pre_hook(_show, with_kwargs=True)  # and after it
    if give is not None:
        give(model)
    fully_shard(model, **options)
    for name, parameter in model.named_parameters():
        if name in few_rows:  # hooks and marks stayed with the whole parameter
            _keep_rows_alive(parameter, few_rows[name])


class _Hidden:
    """Something that is no container."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _hide(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put dataclasses where ``fully_shard`` does not find them.

    It copies those that hold tensors with a gradient, and of the rows that a block records in its copy of an
    ``AttentionContext`` nobody would ever hear.
    """
    return args, {name: _Hidden(value) if is_dataclass(value) else value for name, value in kwargs.items()}


def _show(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: value.value if isinstance(value, _Hidden) else value for name, value in kwargs.items()}


def _keep_rows_alive(table: Any, rows: tuple[int, ...]) -> None:
    """As ``laavit.students.freezing.keep_rows_alive``, of a share of a table."""
    keep = torch.zeros(table.shape[0], 1, dtype=table.dtype, device=table.device)
    if not keep.is_meta:
        keep[list(rows)] = 1
    keep = distribute_tensor(keep, table.device_mesh, table.placements, src_data_rank=None)
    keep = keep.to(table.device)  # it was put on the mesh's device, and with ``offload`` the share is in main memory
    table.few_rows = rows
    # fully_shard runs these hooks after the exchange: the gradient never passes through autograd to its share
    table.register_post_accumulate_grad_hook(lambda shared: shared.grad.mul_(keep))


@STRATEGIES.register_module()
class FSDP2(Strategy):
    """A share of the weights, gradients and optimizer's state in every process.

    With ``train.precision='bf16'`` the shares and what the optimizer keeps stay float32, a block is gathered in bf16,
    and gradients are summed in float32. Autocast is off: the model computes in bf16 by itself.

    Args:
        reshard_after_forward: let a block's weights go after its forward pass, and gather them again for the backward
            pass; False keeps them in between: faster, and the weights are whole at the end of a forward pass.
        offload: 'cpu' keeps the shares and the optimizer's state in the host's memory, where the optimizer then runs.
        replicate: groups of processes that hold a whole model each, in shares (hybrid sharding): with one group a
            machine, only gradients go from machine to machine.
        reduce_every: exchange gradients after every micro-batch of ``train.accumulate``: less memory (gradients are
            not held whole in between), more traffic.
    """

    autocasts = False
    always_joins = True
    shares_weights = True
    hands_out = True

    def __init__(
        self,
        reshard_after_forward: bool = True,
        offload: Literal["none", "cpu"] = "none",
        replicate: int = 1,
        reduce_every: bool = False,
    ) -> None:
        if replicate < 1:
            raise UserError(f"strategy.replicate: got {replicate}; allowed: 1 or more")
        self.reshard_after_forward, self.offload = reshard_after_forward, offload
        self.replicate, self.reduce_every = replicate, reduce_every

    def check(self, settings: TrainSettings, device: torch.device, world_size: int) -> None:
        if self.offload == "cpu" and device.type == "cpu":
            raise UserError("strategy.offload: got 'cpu', and the model is on the CPU already; allowed here: none")
        if settings.cache_vision:
            raise UserError(
                "train.cache_vision: with fsdp2 the processes gather the tower's weights together, and one that finds "
                "its images kept would leave the others waiting; take traces.vision_cache, or strategy 'ddp'"
            )
        if world_size % self.replicate:
            raise UserError(
                f"strategy.replicate: got {self.replicate}, which does not divide this run's {world_size} processes"
            )

    def mesh(self, device_type: str, world_size: int) -> DeviceMesh:
        """The processes: one dimension, or (replicate, shard)."""
        if self.replicate == 1:
            return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
        sizes = self.replicate, world_size // self.replicate
        return init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "shard"))

    def spread(self, model: Any, settings: TrainSettings, device: torch.device) -> nn.Module:
        mesh = self.mesh(device.type, dist.get_world_size())
        give = handing_out(model, device)
        shard(model, mesh, settings.precision, self.reshard_after_forward, self.offload == "cpu", give)
        model.data_preprocessor.to(device)
        model.set_reduce_scatter_unused_params(settings.find_unused_parameters)
        model.reduce_every = self.reduce_every  # the optimizer's wrapper asks
        wrapped: nn.Module = model
        return wrapped

    def full_state(self, model: nn.Module) -> dict[str, Tensor] | None:
        """See ``Strategy.full_state``; one tensor after another is gathered, so that no device holds all of them."""
        here, found = dist.get_rank() == 0, {}
        known: dict[int, Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in known:
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                known[id(tensor)] = whole.detach().cpu() if here else whole.new_empty(0)
            if here:
                found[name] = known[id(tensor)]
        return found
