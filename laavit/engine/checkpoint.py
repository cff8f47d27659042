"""Checkpoints: complete, without pickle, and never half there.

A checkpoint is a folder ``iter_000400``. A consolidated one holds what the model writes (weights as safetensors,
processor) and the optimizer's state (``optimizer.safetensors``, keyed by parameter name); a sharded one what every
process wrote of both (``shards/``, see :mod:`laavit.engine.sharded`) and the processor. Both hold the random generators
(``random.safetensors``) and ``state.json``: step, schedule, data position, settings, recipe, sizes of all files. It is
written under a temporary name, flushed, and renamed (:mod:`laavit.engine.saving`): a process killed at any moment, or
a full disk, leaves the former checkpoint as it was.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from laavit.engine.settings import best_rule
from laavit.files import link_to, remove_tree
from laavit.registry import UserError

STATE, OPTIMIZER, RANDOM = "state.json", "optimizer.safetensors", "random.safetensors"
#: formats by kind: a version that does not know a kind refuses it by its number
FORMATS = {"consolidated": 1, "sharded": 2}
#: a link to the best checkpoint, with ``train.keep_best``
BEST = "best"

logger = logging.getLogger("laavit.engine")


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds beside the weights.

    Args:
        step: optimizer steps done.
        optimizer: tensors of the optimizer, see :mod:`laavit.engine.optimizer_state`.
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


def former_run(work_dir: Path, resume: bool) -> Path | None:
    """The checkpoint that a run in this folder goes on from; None in a new one.

    Raises:
        UserError: there is one, and nobody said that it goes on.
    """
    found = latest_checkpoint(work_dir)
    if found is not None and not resume:
        raise UserError(
            f"'{work_dir}' already holds a run up to '{found.name}': add --resume, or choose another folder"
        )
    return found


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        UserError: the checkpoint is missing, damaged or of a later format.
    """
    if not is_complete(folder):
        raise UserError(f"'{folder}' is no complete checkpoint: {STATE} or a file that it lists is missing or cut off")
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state.get("format") not in FORMATS.values():
        allowed = ", ".join(map(str, FORMATS.values()))
        raise UserError(f"'{folder}' has checkpoint format {state.get('format')}; this version reads {allowed}")
    return state


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint is a sharded one; errors as ``read_state``."""
    return bool(read_state(folder)["format"] == FORMATS["sharded"])


def read_progress(folder: Path) -> Progress:
    """Everything but the weights of a checkpoint, on the CPU; of a sharded one without the optimizer's state.

    Raises:
        UserError: it is damaged.
    """
    state = read_state(folder)
    try:
        optimizer = {} if state["format"] == FORMATS["sharded"] else load_file(folder / OPTIMIZER)
        return Progress(state["iter"], optimizer, load_file(folder / RANDOM), state)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the checkpoint '{folder}' cannot be read: {error}") from None


def best_checkpoint(work_dir: str | Path, rule: str) -> Path | None:
    """The complete checkpoint with the lowest or highest figure (the earliest of equals), or None without one."""
    name, which = best_rule(rule)
    found = []
    for folder in all_checkpoints(Path(work_dir)):
        value = read_state(folder).get("figures", {}).get(name)
        if value is not None:
            found.append((-value if which == "max" else value, folder))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def tidy(work_dir: Path, keep_last: int, keep_best: str | None) -> None:
    """Mark the best checkpoint, then delete all but it and the newest ``keep_last`` (0: none are deleted).

    A failure to mark or delete stops nothing: the checkpoints themselves are written.
    """
    best = best_checkpoint(work_dir, keep_best) if keep_best else None
    old = all_checkpoints(work_dir)[:-keep_last] if keep_last else []
    try:
        if best is not None:
            link_to(best, best.with_name(BEST))
        for folder in old:
            if folder != best:
                remove_tree(folder)
        if not (link := work_dir / "checkpoints" / BEST).exists():
            link.unlink(missing_ok=True)  # the run goes on without keep_best
    except OSError as error:
        logger.warning("the checkpoints in '%s' could not be tidied up: %s", work_dir, error)
