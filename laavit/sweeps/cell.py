"""One cell: train, export, evaluate, by the same commands that are typed by hand; what is finished is not done again.

In a process that ran other cells before, a stage ends with the same bits as in a fresh one: threads, environment and
random generators are put where a stage expects them, and what a run leaves behind is undone (``laavit.engine``).
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from laavit.engine.checkpoint import folder_name, is_complete
from laavit.files import remove_tree, write_json
from laavit.paths import EXPORT_CARD
from laavit.registry import UserError
from laavit.sweeps.plan import RECIPE, Cell, Plan, changed

#: seconds to wait for another process at the same cell: one that is being ended lets go at once
PATIENCE = 5.0


@dataclass(frozen=True)
class Stage:
    """One command of a cell: its name, its words, and whether its outputs are there."""

    name: str
    words: tuple[str, ...]
    finished: Callable[[], bool]


def stages(plan: Plan, cell: Cell) -> Iterator[Stage]:
    """The commands of a cell in order."""
    folder = plan.folder(cell)
    if cell.recipe is not None:
        exported, last = folder / "export" / EXPORT_CARD, folder_name(cell.recipe["train"]["steps"])
        words = ("train", str(folder / RECIPE), "--work-dir", str(folder), "--resume")
        trained = folder / "checkpoints" / last
        yield Stage("train", words, lambda: exported.is_file() or is_complete(trained))
        yield Stage("export", ("export", str(folder)), exported.is_file)
    for mode in plan.modes(cell):
        yield Stage(f"eval {mode}", evaluation(plan, cell, mode), partial(plan.evaluated, cell, mode))


def evaluation(plan: Plan, cell: Cell, mode: str) -> tuple[str, ...]:
    """The words of ``laavit eval``."""
    asked = plan.evaluate
    words = ["eval", plan.model(cell), "--tasks", *asked.tasks, "--latents", mode]
    words += ["--batch-size", str(asked.batch_size), "--out", str(plan.evaluation(cell, mode))]
    words += ["--include-path", *asked.include_path] if asked.include_path else []
    for flag, value in (("--data-root", asked.data_root), ("--limit", asked.limit), ("--protocol", asked.protocol)):
        words += [flag, str(value)] if value is not None else []
    if asked.interventions and mode != "off":  # what is masked cannot be intervened on
        words += ["--interventions", *asked.interventions]
        words += ["--intervention-limit", str(asked.intervention_limit)] if asked.intervention_limit else []
    return tuple(words)


def run_cell(
    plan: Plan, cell: Cell, call: Callable[[Sequence[str]], None], started: Callable[[str], None] = lambda name: None
) -> None:
    """Do what is left of a cell.

    Args:
        call: runs one command by its words, and raises where it fails. started: told the name of each stage.

    Raises:
        UserError: another process works on the cell, what its folder holds is of another plan, or a command refuses.
    """
    folder = plan.folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock", timeout=PATIENCE).acquire()
    except Timeout:
        raise UserError(f"another process works on '{folder}'") from None
    with lock:
        if why := changed(plan, cell):
            raise UserError(f"'{folder}' is of another sweep: {why}; --redo starts it anew")
        if cell.recipe is not None and not (folder / RECIPE).is_file():
            write_json(folder / RECIPE, cell.recipe)
        for stage in stages(plan, cell):
            if not stage.finished():
                started(stage.name)
                call(stage.words)
            if stage.name == "export" and plan.keep == "export":
                remove_tree(folder / "checkpoints")


def in_process(words: Sequence[str]) -> None:
    """Run one of a cell's commands here.

    Raises:
        UserError: the command refuses or stops. SystemExit: as the command's own.
    """
    from laavit.commands import evaluate, export, train

    doors: dict[str, Callable[[Sequence[str]], int]] = {
        "train": train.main,
        "export": export.main,
        "eval": evaluate.main,
    }
    with isolated():
        doors[words[0]](words[1:])


@contextmanager
def isolated(seed: int = 0) -> Iterator[None]:
    """Random generators at a fixed place, and threads and environment afterwards as they were before."""
    threads, environment = torch.get_num_threads(), dict(os.environ)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(environment)
        gc.collect()  # models hold themselves in cycles: the next one would stand beside the last


def redo(plan: Plan, cell: Cell) -> None:
    """Delete what a cell's folder holds of another plan: the whole run, or the evaluations alone."""
    folder = plan.folder(cell)
    why = changed(plan, cell)
    if why is not None:
        remove_tree(folder / "eval" if why.startswith("evaluate.") else folder)


def tail(log: Path, lines: int = 15) -> list[str]:
    """The last lines of a cell's log, progress bars left out."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        text = file.read().decode("utf-8", errors="replace")
    found = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in found if line][-lines:]
