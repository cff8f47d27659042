"""Checkpoints: complete, without pickle, and never half there.

A checkpoint is a folder ``iter_000400`` with what the model writes (weights as safetensors, processor), the optimizer's
state (``optimizer.safetensors``, keyed by parameter name), the random generators (``random.safetensors``) and
``state.json`` (step, schedule, data position, settings, sizes of all files). It is written under a temporary name,
flushed, and renamed: a process killed at any moment, or a full disk, leaves the former checkpoint as it was.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from laavit.engine.settings import TrainingStopped
from laavit.files import TEMPORARY, remove_leftovers, remove_tree, sync_entry, sync_tree, write_json
from laavit.registry import UserError

STATE, OPTIMIZER, RANDOM = "state.json", "optimizer.safetensors", "random.safetensors"
FORMAT = 1

logger = logging.getLogger("laavit.engine")


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds beside the weights.

    Args:
        step: optimizer steps done.
        optimizer: tensors of the optimizer, see :func:`laavit.engine.optim.optimizer_tensors`.
        random: states of the generators, see :mod:`laavit.engine.random_state`.
        state: plain data: schedule, data position, settings.
    """

    step: int
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    state: dict[str, Any]


def folder_name(step: int) -> str:
    """``iter_000400`` for 400 steps done."""
    return f"iter_{step:06d}"


def is_complete(folder: Path) -> bool:
    """Whether every file that was written is there in its full size."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in state["files"].items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def all_checkpoints(work_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; incomplete ones are named in the log and passed over."""
    found = []
    for folder in (work_dir / "checkpoints").glob("iter_*"):
        if not folder.name.removeprefix("iter_").isdigit():
            continue
        if is_complete(folder):
            found.append(folder)
        else:
            logger.warning("%s is incomplete and is passed over", folder)
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("iter_")))


def latest_checkpoint(work_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(all_checkpoints(Path(work_dir))), None)


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        UserError: the checkpoint is missing, damaged or of a later format.
    """
    if not is_complete(folder):
        raise UserError(f"'{folder}' is no complete checkpoint: {STATE} or a file that it lists is missing or cut off")
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise UserError(f"'{folder}' has checkpoint format {state.get('format')}; this version reads {FORMAT}")
    return state


def read_progress(folder: Path) -> Progress:
    """Everything but the weights of a checkpoint, on the CPU.

    Raises:
        UserError: it is damaged.
    """
    state = read_state(folder)
    try:
        return Progress(state["iter"], load_file(folder / OPTIMIZER), load_file(folder / RANDOM), state)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the checkpoint '{folder}' cannot be read: {error}") from None


def write_checkpoint(work_dir: Path, model: Any, progress: Progress, keep_last: int) -> Path:
    """Write a checkpoint atomically, then delete those older than the ``keep_last`` newest (0: keep all).

    Args:
        model: its ``save_checkpoint(folder)`` writes weights and processor.

    Raises:
        TrainingStopped: it could not be written (disk full, no permission); the former checkpoints are intact.
    """
    root = work_dir / "checkpoints"
    final = root / folder_name(progress.step)
    beside = root / f"{TEMPORARY}{os.getpid()}-{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_tree(beside)
        beside.mkdir()
        model.save_checkpoint(beside)
        save_file(progress.optimizer, beside / OPTIMIZER)
        save_file(progress.random, beside / RANDOM)
        files = {str(p.relative_to(beside)): p.stat().st_size for p in sorted(beside.rglob("*")) if p.is_file()}
        write_json(beside / STATE, {"format": FORMAT, "iter": progress.step, **progress.state, "files": files})
        sync_tree(beside)
        remove_tree(final)  # one of the same step, from a run that was resumed further back
        os.replace(beside, final)
        sync_entry(root)
    except (OSError, SafetensorError) as error:
        remove_leftovers_quietly(root)
        before = latest_checkpoint(work_dir)
        raise TrainingStopped(
            f"the checkpoint of step {progress.step} could not be written to '{root}' ({error}); "
            + (f"the last complete one is '{before}': " if before else "there is no earlier one: ")
            + "make room, then run again with --resume"
        ) from error
    prune(work_dir, keep_last)
    return final


def prune(work_dir: Path, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` complete checkpoints (0: none); a failure to delete stops nothing."""
    for old in all_checkpoints(work_dir)[:-keep_last] if keep_last else []:
        try:
            remove_tree(old)
        except OSError as error:
            logger.warning("the old checkpoint '%s' could not be deleted: %s", old, error)


def remove_leftovers_quietly(root: Path) -> None:
    """Clean up after a failed write, without hiding why it failed."""
    try:
        remove_leftovers(root)
    except OSError as error:
        logger.warning("could not clean up in %s: %s", root, error)
