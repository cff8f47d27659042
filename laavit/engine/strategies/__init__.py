"""How a model is spread over processes: single, ddp, fsdp2, or one of the user's own."""

from laavit.engine.strategies.base import Strategy, enable_gradient_checkpointing, strategy_for
from laavit.engine.strategies.ddp import DDP
from laavit.engine.strategies.single import Single

__all__ = ["DDP", "Single", "Strategy", "enable_gradient_checkpointing", "strategy_for"]
