"""One process reads a model's weights; the others build shapes alone and are given theirs, a block at a time.

So that a machine with eight processes does not hold eight models in its memory: a process that waits for weights holds
its shares, one block, and what stands in no block.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from laavit.engine.distributed import any_process, rank_and_world


def without_weights(model: nn.Module) -> bool:
    """Whether a model, or a part of it, is shapes alone (``laavit.backbones.loading.shapes_alone``)."""
    return any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers()))


def handing_out(model: nn.Module, device: torch.device) -> Callable[[nn.Module], None] | None:
    """What gives a part of a model, in all processes together, the weights that process 0 has.

    None where every process has weights. Every tensor is given, also buffers that no checkpoint holds and heads that
    every process has drawn for itself: all processes begin with process 0's bits.

    Args:
        model: not spread yet. device: where tensors can be exchanged, and where those arrive that were shapes alone.

    Raises:
        RuntimeError: the processes have built unequal models, or it is process 0 that has no weights.
    """
    if not any_process(without_weights(model), device):
        return None
    named = chain(model.named_parameters(), model.named_buffers())
    names = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in named]
    told: list[Any] = [(names, without_weights(model))]
    dist.broadcast_object_list(told, src=0)
    theirs, lacking = told[0]
    if any_process(names != theirs, device) or lacking:
        raise RuntimeError("process 0 cannot give its weights to the others: their models have other tensors")
    done = WeakTensorKeyDictionary()  # a tied tensor once; a strong reference would keep whole weights alive

    def give(part: nn.Module) -> None:
        for module in part.modules():
            tables: tuple[Any, ...] = module._parameters, module._buffers
            for own in tables:
                for name, tensor in own.items():
                    if tensor is not None and not isinstance(tensor, DTensor):
                        own[name] = _given(tensor, device, done)

    return give


def _given(tensor: Tensor, device: torch.device, done: WeakTensorKeyDictionary) -> Tensor:
    """A tensor with process 0's content; itself, unless it was a shape alone."""
    if tensor in done:
        known: Tensor | None = done[tensor]
        return tensor if known is None else known
    first = rank_and_world()[0] == 0
    if first:
        sent = tensor.detach().to(device).contiguous()
    else:
        sent = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    dist.broadcast(sent, src=0)
    done[tensor] = None
    if first:
        return tensor
    if not tensor.is_meta:
        with torch.no_grad():
            tensor.copy_(sent)
        return tensor
    arrived = nn.Parameter(sent, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else sent
    done[tensor], done[arrived] = arrived, None
    return arrived
