"""One process, one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from laavit.engine.strategies.base import Strategy
from laavit.registry import STRATEGIES, UserError

if TYPE_CHECKING:
    from laavit.engine.settings import TrainSettings


@STRATEGIES.register_module()
class Single(Strategy):
    """The whole model in one process."""

    def check(self, settings: TrainSettings, device: torch.device, world_size: int) -> None:
        if world_size > 1:
            raise UserError(
                f"strategy: single trains in one process, and {world_size} were started; take ddp (or leave it out), "
                "or fsdp2 where the model is too large for one device"
            )

    def spread(self, model: Any, settings: TrainSettings, device: torch.device) -> nn.Module:
        moved: nn.Module = model.to(device)
        return moved
