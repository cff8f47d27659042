"""How a model is spread over processes: single, ddp, fsdp2, or one of the user's own."""

from laavit.engine.strategies.base import Strategy, enable_gradient_checkpointing, strategy_for
from laavit.engine.strategies.ddp import DDP
from laavit.engine.strategies.fsdp2 import FSDP2, shard, shard_blocks
from laavit.engine.strategies.single import Single

__all__ = [
    "DDP",
    "FSDP2",
    "Single",
    "Strategy",
    "enable_gradient_checkpointing",
    "shard",
    "shard_blocks",
    "strategy_for",
]
