"""How long a step and a run take, and what they leave on the disk, by assumptions that are named."""

from __future__ import annotations

from typing import Any

from laavit.engine.planning.machines import Machine
from laavit.engine.settings import TrainSettings

#: bytes of one parameter that a step of AdamW reads and writes in float32: weight, gradient and two moments in, weight
#: and two moments out
OPTIMIZER_TRAFFIC = 7 * 4


def step_seconds(flops: float, trainable: float, machine: Machine, share: float) -> float:
    """Seconds of an optimizer step of one GPU.

    Args:
        flops: all that is computed, again or not. trainable: parameters that this process's optimizer updates.
        share: of the machine's peak arithmetic, assumed.
    """
    return flops / (machine.flops * share) + trainable * OPTIMIZER_TRAFFIC / machine.bandwidth


def storage(weights: int, trainable: int, settings: TrainSettings, samples: int, trace: int | None) -> dict[str, Any]:
    """Bytes that a run leaves on the disk.

    Args:
        weights: bytes of what a consolidated checkpoint holds of the model. trainable: bytes of what learns, all that a
            sharded one holds; AdamW keeps twice that. samples: that the run reads.
        trace: bytes of a sample's trace, None without a teacher.
    """
    every = settings.checkpoint_every or settings.steps
    made = -(-settings.steps // every)
    last = weights + 2 * trainable  # whole, whatever the format
    one = 3 * trainable if settings.checkpoint_format == "sharded" else last
    kept = min(settings.keep_last or made, made) + bool(settings.keep_best)
    # the new one is whole before an old one goes
    there = min(kept + 1, made)
    return {
        "checkpoint": one if made > 1 else last,
        "format": settings.checkpoint_format if made > 1 else "consolidated",
        "kept": min(kept, made),
        "checkpoints": one * (there - 1) + max(one, last),
        "traces": None if trace is None else trace * samples,
        "samples": samples,
    }
