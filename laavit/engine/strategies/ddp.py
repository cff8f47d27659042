"""A whole model in every process, gradients averaged (Li et al., arXiv 2006.15704)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from laavit.engine.strategies.base import Strategy
from laavit.registry import STRATEGIES, UserError

if TYPE_CHECKING:
    from laavit.engine.settings import TrainSettings

warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # mmengine's wrapper knows no other name


@STRATEGIES.register_module()
class DDP(Strategy):
    """The whole model in every process; gradients are averaged while the backward pass goes on."""

    def check(self, settings: TrainSettings, device: torch.device, world_size: int) -> None:
        if world_size == 1:
            raise UserError(
                "strategy: ddp copies the model to several processes, and this run has one; start it with "
                "'torchrun --nproc-per-node N', or take single (or leave the strategy out)"
            )

    def spread(self, model: Any, settings: TrainSettings, device: torch.device) -> nn.Module:
        from mmengine.model import MMDistributedDataParallel  # of seconds, and a recipe is read without it

        return MMDistributedDataParallel(
            module=model.to(device),
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            find_unused_parameters=settings.find_unused_parameters,
        )

    def unwrapped(self, wrapped: nn.Module) -> Any:
        return wrapped.module
