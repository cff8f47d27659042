"""The few things processes say to each other; every function is the identity in a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from laavit.registry import UserError


def pick_device(name: str) -> torch.device:
    """'auto', 'cpu', 'cuda' or 'cuda:1' -> a device; with torchrun, 'auto' and 'cuda' mean this process's own GPU.

    Raises:
        UserError: the device is not there or has no such name.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"train.device: got '{name}'; allowed: auto, cpu, cuda, cuda:<number>") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"train.device: got '{name}'; allowed: auto, cpu, cuda, cuda:<number>")
    if device.type == "cuda":
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.cuda.device_count():
            raise UserError(f"train.device: got '{name}', but this machine shows {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: torch.device, always: bool = False, stall_minutes: float = 0.0) -> Iterator[None]:
    """Join the other processes that torchrun started (RANK, WORLD_SIZE): gloo on the CPU, nccl for tensors on GPUs.

    mmengine would call ``torch.cuda.set_device`` whatever the machine, so the group is there before its Runner is.
    A group that the caller made is used and left alone.

    Args:
        always: make a group of one process, too.
        stall_minutes: after which the run ends by itself (``train.stall_minutes``): a collective waits for longer, so
            that it is that end, with its report, which comes first; 0 leaves PyTorch's own time.
    """
    alone = int(os.environ.get("WORLD_SIZE", 1)) <= 1
    if dist.is_initialized() or (alone and not always):
        yield
        return
    # gloo beside nccl: with fsdp2's offload='cpu' gradients, and hence their norm, lie in main memory.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        limit = timedelta(minutes=2 * stall_minutes + 5) if stall_minutes else None
        dist.init_process_group(backend, timeout=limit)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean of a tensor over all processes, same shape."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    if not dist.is_initialized():
        return flag
    told = torch.tensor([float(flag)], device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told.item())


def gather(values: Tensor, device: torch.device) -> Tensor:
    """[...] of every process -> [W, ...], on the CPU; all processes give the same shape."""
    if not dist.is_initialized():
        return values.cpu()[None]
    values = values.to(device)
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts).cpu()
