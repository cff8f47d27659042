"""What has to be there before the first cell: data, traces, students; each command once."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from laavit.files import write_text
from laavit.registry import UserError
from laavit.sweeps.cell import tail
from laavit.sweeps.plan import Cell
from laavit.sweeps.settings import SEED, Command, with_seed

logger = logging.getLogger(__name__)

#: the word a command line begins with -> what runs it
PROGRAMS = {"laavit": (sys.executable, "-m", "laavit.cli"), "python": (sys.executable,)}


def expanded(stage: Sequence[Command], cells: Sequence[Cell]) -> list[Command]:
    """The commands that some cells need, one a seed where they name the seed."""
    found = []
    for command in stage:
        own = [cell for cell in cells if not command.arms or {cell.arm, cell.arm.partition("+")[0]} & {*command.arms}]
        seeds = sorted({cell.seed for cell in own})
        if SEED not in command.run:
            found += [command] if own else []
            continue
        for seed in seeds:
            creates = None if command.creates is None else with_seed(command.creates, seed)
            found.append(Command(with_seed(command.run, seed), creates, command.arms))
    return found


def marker(command: Command, out: Path) -> Path:
    """The path whose being there says that a command is done."""
    own = out / "before" / f"{hashlib.sha256(command.run.encode()).hexdigest()[:12]}.done"
    return Path(command.creates) if command.creates is not None else own


def missing(stages: Sequence[Sequence[Command]], cells: Sequence[Cell], out: Path) -> list[list[Command]]:
    """The commands that some cells need and that are not done yet, stage by stage."""
    found = [[each for each in expanded(stage, cells) if not marker(each, out).exists()] for stage in stages]
    return [stage for stage in found if stage]


def prepare(stages: Sequence[Sequence[Command]], cells: Sequence[Cell], out: Path, workers: int, threads: int) -> None:
    """Run what is not done yet, the commands of a stage side by side.

    Raises:
        UserError: a command failed, or did not leave what it was to create; its log's last lines are in the message.
    """
    console = Console(stderr=True)
    for todo in missing(stages, cells, out):
        for command in todo:
            logger.info("$ %s", command.run)
        waiting = f"{len(todo)} commands" if len(todo) > 1 else todo[0].run
        with console.status(waiting), ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(_run, command, out, threads) for command in todo]:
                done.result()


def _run(command: Command, out: Path, threads: int) -> None:
    words = shlex.split(command.run)
    words = [*PROGRAMS.get(words[0], (words[0],)), *words[1:]]
    log = out / "before" / f"{hashlib.sha256(command.run.encode()).hexdigest()[:12]}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ {command.run}\n")
        file.flush()
        code = subprocess.run(words, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise UserError(f"before: '{command.run}' ended with {code}: " + " | ".join(tail(log, 5)))
    if command.creates is None:
        write_text(marker(command, out), command.run + "\n")
    elif not Path(command.creates).exists():
        raise UserError(f"before: '{command.run}' ended well, and there is no '{command.creates}'")
