"""A SLURM job array: the list of cells, the script that runs one of them, and the lines that hand it in."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laavit.files import write_text
from laavit.registry import UserError
from laavit.sweeps.plan import FILE, Cell, Plan

FOLDER, CELLS, ARRAY, BEFORE = "slurm", "cells.txt", "array.sh", "before.sh"
#: options of sbatch that are written here
OURS = ("array", "job-name", "output")


def script(
    plan: Plan, name: str, options: Mapping[str, Any], lines: Sequence[str], more: Mapping[str, Any] | None = None
) -> str:
    """A batch script.

    Args:
        options: of sbatch, the user's. more: the sweep's own. lines: what is run.

    Raises:
        UserError: an option that is written here is given.
    """
    for key in options:
        if key in OURS:
            raise UserError(f"slurm.{key}: the sweep writes it itself; other options of sbatch are allowed")
    given = {"job-name": name, "output": plan.out.resolve() / FOLDER / "%x_%A_%a.out", **(more or {}), **options}
    head = [f"#SBATCH --{key}={value}" if value is not True else f"#SBATCH --{key}" for key, value in given.items()]
    return "\n".join(["#!/bin/bash", *head, "set -euo pipefail", f"cd {shlex.quote(str(Path.cwd()))}", *lines, ""])


def write_array(
    plan: Plan, todo: Sequence[Cell], options: Mapping[str, Any], processes: int, words: Sequence[str], before: bool
) -> str:
    """Write OUT/slurm/cells.txt, array.sh and, where something has to be made first, before.sh.

    Args:
        options: of sbatch; ``max`` limits how many jobs run at a time. words: of this command, for what comes before
            and after. before: whether anything is left to be made.

    Returns:
        The lines to type.
    """
    folder, own = plan.out / FOLDER, dict(options)
    limit = f"%{own.pop('max')}" if "max" in own else ""
    laavit = shlex.join([sys.executable, "-m", "laavit.cli", "sweep"])
    cells = shlex.quote(str((folder / CELLS).resolve()))
    lines = [
        f'CELL=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {cells})',
        f'exec {laavit} {shlex.quote(str((plan.out / FILE).resolve()))} --cell "$CELL" --nproc-per-node {processes}',
    ]
    write_text(folder / CELLS, "".join(f"{cell.name}\n" for cell in todo))
    own_array = {"array": f"0-{len(todo) - 1}{limit}"}
    write_text(folder / ARRAY, script(plan, plan.name, own, lines, own_array))
    said = [f"sbatch {shlex.quote(str(folder / ARRAY))}"]
    if before:
        made = script(plan, f"{plan.name}-before", own, [f"exec {laavit} {shlex.join(words)} --only-before"])
        write_text(folder / BEFORE, made)
        said = [
            f"first=$(sbatch --parsable {shlex.quote(str(folder / BEFORE))})",
            f"sbatch --dependency=afterok:$first {shlex.quote(str(folder / ARRAY))}",
        ]
    return "\n".join([*said, f"{shlex.join(['laavit', 'sweep', *words])} --table  # when they are through"]) + "\n"
