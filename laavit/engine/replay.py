"""A kept batch once more: which losses, which part of the model and which gradients are not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laavit.engine.bad_batch import BadBatch, read_bad_batches
from laavit.engine.checkpoint import all_checkpoints
from laavit.engine.loop import sample_ids
from laavit.engine.resuming import load_weights
from laavit.engine.settings import TrainSettings

SHOWN = 8

logger = logging.getLogger("laavit.engine")


def checkpoint_before(work_dir: Path, step: int) -> Path | None:
    """The newest complete checkpoint of at most ``step`` steps."""
    found = [path for path in all_checkpoints(work_dir) if int(path.name.removeprefix("iter_")) <= step]
    return found[-1] if found else None


@contextmanager
def first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Inside, the names of modules whose output is not finite, in the order in which they end."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not torch.isfinite(output).all():
                found.append(name or "the model")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def replay(model: Any, folder: Path, settings: TrainSettings, device: torch.device) -> list[dict[str, Any]]:
    """Run what a step kept forward and backward, with the generators as they were then.

    The weights are those of the run's newest checkpoint before the step (steps in between are not made again), or the
    recipe's first ones where there is none.

    Args:
        model: as ``train`` takes it. folder: ``RUN/bad_batches/step_<number>``.

    Returns: for each micro-batch of each process its ``rank``, ``samples``, ``figures`` (losses), ``modules`` whose
    output is not finite, innermost first, and ``parameters`` whose gradient is not.

    Raises:
        UserError: nothing is kept there, or it cannot be read.
    """
    kept = read_bad_batches(folder)
    step = next(iter(kept.values())).facts["step"]
    checkpoint = checkpoint_before(folder.resolve().parent.parent, step)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    logger.info("step %d with the weights of %s", step, checkpoint or "the recipe's start")
    model.to(device).train()
    model.set_step(step)
    found = []
    for rank, bad in kept.items():
        for record in _replayed(model, bad, settings, device):
            found.append({"rank": rank, **record})
            logger.info("process %d: %s", rank, told(record))
    return found


def _replayed(model: Any, bad: BadBatch, settings: TrainSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(bad.random["torch"])
        if device.type == "cuda" and "cuda" in bad.random:
            torch.cuda.set_rng_state(bad.random["cuda"], device)
        for batch in bad.batches:
            model.zero_grad(set_to_none=True)
            with first_not_finite(model) as modules:
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
                    outputs = model(**model.data_preprocessor(batch, True))
            outputs["loss"].backward()
            broken = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            figures = {name: float(value.detach()) for name, value in outputs.items()}
            yield {"samples": sample_ids(batch), "figures": figures, "modules": modules, "parameters": broken}
    model.zero_grad(set_to_none=True)


def told(record: dict[str, Any]) -> str:
    """One line of a micro-batch."""
    line = ", ".join(f"{name} {value:.6g}" for name, value in record["figures"].items())
    if all(math.isfinite(value) for value in record["figures"].values()) and not record["parameters"]:
        return f"{line}: all finite with these weights"
    broken, first = record["parameters"], record["modules"][:1]
    line += f"; first output that is not finite: {first[0] if first else 'none'}"
    names = ", ".join(broken[:SHOWN]) + (f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else "")
    return f"{line}; gradients that are not: {names or 'none'}; samples: {', '.join(record['samples'])}"
