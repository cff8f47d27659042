"""Losses over the global batch: what a micro-batch's means count among those of all micro-batches and processes.

A loss is a mean over things that micro-batches hold unequal numbers of (answer tokens, samples). With c such things in
a micro-batch and C in the whole step,

    (sum over the step) / C = sum over its micro-batches of (c / C) * (mean over the micro-batch)

The optimizer's wrapper divides by the number A of micro-batches, DDP and FSDP by the number W of processes, so that
a micro-batch's mean is multiplied by its share c * A * W / C, which is 1 where all hold the same number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from laavit.engine.distributed import rank_and_world


def add_shares(model: Any, batches: Sequence[Any], device: torch.device) -> None:
    """Give each micro-batch of a step, as ``shares``, the factors of its losses; one exchange between processes.

    A single micro-batch in a single process is left as it is, and so are those of a model without ``counts``, whose
    losses count alike.

    Args:
        model: unwrapped; ``model.counts(**batch)`` tells over how many things each loss is a mean, by its name.
        batches: this process's micro-batches, arguments of ``forward``. device: where counts can be exchanged.
    """
    world = rank_and_world()[1]
    if not hasattr(model, "counts") or len(batches) * world == 1:
        return
    counts: list[Mapping[str, int | Tensor]] = [model.counts(**batch) for batch in batches]
    names = list(counts[0])
    own = torch.stack([torch.stack([torch.as_tensor(each[name]) for name in names]) for each in counts])  # [A, losses]
    own = own.to(device, torch.float64, non_blocking=True)
    total = own.sum(0)
    if world > 1:
        dist.all_reduce(total)
    shares = own * (len(batches) * world) / total.clamp(min=1)  # a device's tensors: the host waits for nobody
    for batch, row in zip(batches, shares, strict=True):
        batch["shares"] = dict(zip(names, row, strict=True))
