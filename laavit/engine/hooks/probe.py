"""Looks at samples that are not trained on, every so many steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from laavit.engine.probe import Probe
from laavit.engine.settings import TrainSettings

PREFIX = "probe/"


class ProbeHook(Hook):
    """Adds ``probe/<figure>`` to the log: means over the held-out samples of all processes, in eval mode (gate open).

    The steps' bits are the same with it and without.

    Args:
        settings: which steps. probe: what is looked at.
    """

    def __init__(self, settings: TrainSettings, probe: Probe) -> None:
        self.settings, self.probe = settings, probe

    def before_train(self, runner: Any) -> None:
        """Load and encode the samples now: what is wrong with them is said before the first step."""
        if self.settings.probe_every:
            self.probe.batches()

    def before_log(self, runner: Any, record: dict[str, Any]) -> None:
        """Look, where it is time."""
        if not self.settings.probes(record["iter"]):
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        device = runner.optim_wrapper.device
        sums = self.probe.look(model, runner.model, device, runner.optim_wrapper.precision)
        if not sums:
            return
        pairs = torch.stack(list(sums.values()))  # [figures, 2]
        if dist.is_initialized():
            dist.all_reduce(pairs)
        for name, (total, count) in zip(sums, pairs.tolist(), strict=True):
            mean = total / count if count else float("nan")
            record[f"{PREFIX}{name}"] = mean if abs(mean) < float("inf") else None  # NaN is no JSON either
