"""Where a run goes on: which checkpoint, whether it fits the run, and how everything is put back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laavit.backbones.base import digest_of
from laavit.engine import random_state
from laavit.engine.checkpoint import former_run, is_sharded, read_progress, read_state
from laavit.engine.distributed import any_process
from laavit.engine.optim import NamedParameters
from laavit.engine.optimizer_state import check_fits, load_optimizer_state
from laavit.engine.sampler import BatchSampler
from laavit.engine.settings import TrainSettings
from laavit.engine.sharded import MODEL, OPTIMIZER, SHARDS, dtypes, read_shards, stored_shapes
from laavit.engine.strategies.handing import without_weights
from laavit.files import remove_leftovers
from laavit.registry import UserError

logger = logging.getLogger("laavit.engine")

#: of ``state.json``: the hash of the weights that a sharded checkpoint does not hold
FROZEN = "frozen_sha256"
#: settings that the order of the data depends on: a resumed run must have the same
FIXED = ("seed", "batch_size", "grouped", "bucketing", "tokens")
#: settings that may change between start and resume without changing the result
FREE = (
    *("workers", "prefetch", "cache_vision", "checkpoint_every", "keep_last", "log_every", "tensorboard", "device"),
    *("wandb", "skip_nonfinite", "on_divergence", "stall_minutes"),
    *("probe_every", "probe_samples", "probe_annotations", "probe_split", "probe_traces"),
    *("find_unused_parameters", "checkpoint_format", "checkpoint_async", "keep_best", "disk_retry_s"),
)


def starting_point(work_dir: Path, resume: bool, rank: int, device: torch.device) -> Path | None:
    """The checkpoint to go on from, the same in every process; leftovers of a killed run are cleared."""
    if rank == 0:
        try:
            (work_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            remove_leftovers(work_dir)
            remove_leftovers(work_dir / "checkpoints")
        except OSError as error:
            raise UserError(f"the run folder '{work_dir}' cannot be written: {error}") from None
    any_process(False, device)  # nobody looks before process 0 has cleaned up
    found = former_run(work_dir, resume)
    if found is None and resume and rank == 0:
        logger.info("nothing to resume in %s: starting at step 0", work_dir)
    return found


def check_resumable(checkpoint: Path, settings: TrainSettings, sampler: BatchSampler) -> int:
    """Compare a checkpoint with the run that wants to go on from it; returns the steps done."""
    state = read_state(checkpoint)
    before, now = state["settings"], settings.as_dict()
    by_length = settings.bucketing or settings.tokens  # and how long a sample counts depends on what is shared
    for name in (*FIXED, *(("shared_prefix",) if by_length else ())):
        if before.get(name, 0) != now[name]:  # a run of before it could be said had none
            raise UserError(
                f"train.{name}: got {now[name]}, but the run in '{checkpoint.parent.parent}' has {before.get(name, 0)}"
            )
    if state["data"]["fingerprint"] != sampler.fingerprint:
        raise UserError(
            f"the data set differs from the one that '{checkpoint.parent.parent}' was trained on "
            f"({state['data']['length']} samples then): resume with the same data and filters"
        )
    if int(state["iter"]) > settings.steps:
        raise UserError(
            f"train.steps: got {settings.steps}, and the run in '{checkpoint.parent.parent}' has done {state['iter']}"
        )
    changed = [f"{k} {before.get(k)} -> {now[k]}" for k in now if k not in FREE and before.get(k) != now[k]]
    if changed:
        logger.warning("resuming with other settings, so not to the same bits: %s", ", ".join(changed))
    return int(state["iter"])


def load_weights(model: Any, checkpoint: Path) -> None:
    """Put a checkpoint's weights into a model of its recipe, before it is spread over processes.

    A sharded checkpoint holds what was learned; the rest is the model's own already. A process that waits for its
    weights reads nothing.

    Raises:
        UserError: it cannot be read, or belongs to a model with other parameters, or with other frozen weights.
    """
    if without_weights(model):
        return
    if not is_sharded(checkpoint):
        model.load_checkpoint(checkpoint)
        return
    learned = [name for name, _ in model.trainable_parameters()]
    load_learned(model.state_dict(), checkpoint, MODEL, learned)
    if hasattr(model, "student"):
        check_frozen(model.student, checkpoint)


def frozen_digest(student: nn.Module, learned: Container[str]) -> str | None:
    """SHA-256 of a student's weights but those of the names that learned; None where there are none.

    With adapters that of the base as it was read: the latents' rows in its tables are drawn, and kept by the adapters.
    """
    if getattr(student, "base_sha256", None) is not None:
        return str(student.base_sha256)
    frozen = {name: p.detach() for name, p in student.named_parameters() if name not in learned}
    return digest_of(frozen) if frozen and not without_weights(student) else None


def check_frozen(student: nn.Module, checkpoint: Path) -> None:
    """Compare a student's frozen weights with those that a sharded checkpoint was trained beside, and does not hold.

    Raises:
        UserError: they are others.
    """
    before = read_state(checkpoint).get(FROZEN)  # checkpoints of before it was told have none
    learned = {name.removeprefix(f"{MODEL}student.") for name in stored_shapes(checkpoint / SHARDS)}
    if before is not None and before != (now := frozen_digest(student, learned)):
        raise UserError(
            f"the checkpoint '{checkpoint}' holds what was learned alone, and the weights beside it are others now: "
            f"those of '{getattr(student, 'path', 'the student')}' that do not learn have the SHA-256 "
            f"{str(now)[:12]}..., and it was trained with {before[:12]}...: put the student's files back"
        )


def load_learned(state: Mapping[str, Tensor], checkpoint: Path, prefix: str, learned: Iterable[str] = ()) -> None:
    """Fill the tensors of a ``state_dict`` in place from a sharded checkpoint.

    Args:
        prefix: what the names of the tensors have before them in the checkpoint.
        learned: names that must be there.

    Raises:
        UserError: as ``load_weights``.
    """
    shapes = stored_shapes(checkpoint / SHARDS)
    stored = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    for name in sorted({*stored, *learned}):
        if name not in stored or name not in state:
            where = "the checkpoint" if name in stored else "the model"
            raise UserError(f"the checkpoint '{checkpoint}' does not fit: '{name}' is only in {where}")
        if stored[name] != state[name].shape:
            raise UserError(
                f"the checkpoint '{checkpoint}' does not fit: '{name}' is {tuple(stored[name])} there and "
                f"{tuple(state[name].shape)} in the model"
            )
    read_shards(checkpoint / SHARDS, {f"{prefix}{name}": state[name] for name in stored})


def read_optimizer(checkpoint: Path, named: NamedParameters) -> dict[str, Tensor]:
    """The optimizer's state in a sharded checkpoint: of sharded parameters, this process's share alone.

    Raises:
        UserError: it cannot be read, or belongs to other parameters.
    """
    folder, names = checkpoint / SHARDS, dict(named)
    shapes = {path: shape for path, shape in stored_shapes(folder).items() if path.startswith(OPTIMIZER)}
    check_fits({path.removeprefix(OPTIMIZER): shape for path, shape in shapes.items()}, named)
    kinds, found = dtypes(folder), {}
    for path, shape in shapes.items():
        parameter = names[path.removeprefix(OPTIMIZER).rpartition("/")[0]].data
        like = parameter if shape == parameter.shape else torch.empty(shape)
        found[path] = torch.empty_like(like, dtype=kinds[path])
    read_shards(folder, found)
    return {path.removeprefix(OPTIMIZER): tensor for path, tensor in found.items()}


def restorer(checkpoint: Path, named: NamedParameters, device: torch.device) -> Callable[[Any], None]:
    """Puts optimizer, schedule and generators where the checkpoint has them (the weights are loaded before)."""

    def restore(runner: Any) -> None:
        progress = read_progress(checkpoint)
        tensors = read_optimizer(checkpoint, named) if is_sharded(checkpoint) else progress.optimizer
        load_optimizer_state(runner.optim_wrapper.optimizer, named, tensors)
        runner.param_schedulers[0].load_state_dict(progress.state["scheduler"])
        runner.skipped = progress.state.get("skipped", 0)
        if not random_state.restore(progress.random, device):
            logger.warning("resuming with another number of processes, so not to the same bits")
        logger.info("resumed at step %d from %s", progress.step, checkpoint)

    return restore
