"""What a step reads, and what the device could compute: the two sides of tokens per second and of MFU."""

from __future__ import annotations

import re
import resource
import sys
from typing import Any

import torch

from laavit.engine.flops import BatchShape, step_flops
from laavit.engine.loop import sample_ids
from laavit.engine.planning.machines import MACHINES
from laavit.structures import Batch


def peak_flops(device: torch.device, precision: str) -> float | None:
    """What the device can do in bf16, FLOP/s; None where it is not known (a CPU, a GPU without an entry, fp32)."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
    # The longest first ('H100 PCIe' before 'H100'); no digit may follow ('L4' is no 'L40').
    for known in sorted(MACHINES, key=len, reverse=True):
        if re.search(re.sub(r"(?<=[a-z])(?=\d)", "-?", known) + r"(?!\d)", name):
            return MACHINES[known].flops
    return None


def batch_of(data: Any) -> Batch | None:
    """The ``Batch`` among the arguments of ``forward``, where there is one."""
    parts = [data, *data.values()] if isinstance(data, dict) else [data]
    return next((part for part in parts if isinstance(part, Batch)), None)


class Work:
    """What this process has read since the last logged step.

    Args:
        model: unwrapped, for its FLOPs. peak: of the device, None leaves FLOPs uncounted.
    """

    def __init__(self, model: Any, peak: float | None) -> None:
        self.model, self.peak = model, peak
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.samples, self.tokens, self.flops = 0, 0, 0.0

    def add(self, data: Any) -> None:
        """Count a micro-batch, which lies on the CPU: no wait for a GPU."""
        self.samples += len(sample_ids(data))
        batch = batch_of(data)
        if batch is None:
            return
        self.tokens += sum(read for read, _ in BatchShape.of(batch).passes)
        if self.peak is not None:
            self.flops += step_flops(self.model, batch)

    def counts(self) -> list[float]:
        """Samples, tokens and FLOPs."""
        return [self.samples, self.tokens, self.flops]

    def rates(self, totals: list[float], seconds: float, world: int) -> dict[str, float]:
        """Figures of the log, of all processes' counts; what is not known (no tokens, no peak) is left out."""
        samples, tokens, flops = (value / max(seconds, 1e-9) for value in totals)
        found = {"samples_per_second": round(samples, 4)} if samples else {}
        if tokens:
            found["tokens_per_second"] = round(tokens, 2)
        if self.peak is not None and flops:
            found["mfu"] = round(flops / (self.peak * world), 5)
        return found


def memory_figures(device: torch.device) -> dict[str, float]:
    """Peaks since the process began, in GiB: of its own memory, and on a GPU of what tensors took there."""
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    found = {"host_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)}
    if device.type == "cuda":
        found["memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return found
