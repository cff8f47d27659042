"""``tools/sweep.py sweep.py``: train, export and evaluate many runs, and put them into one table."""

from __future__ import annotations

import logging
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from laavit.commands.common import Parser, minutes
from laavit.recipe import parse_overrides, zoo_path
from laavit.registry import UserError
from laavit.sweeps.plan import Cell, Plan, changed, check_stores, check_tasks, plan_of
from laavit.sweeps.settings import Sweep, read_arms, read_sweep

logger = logging.getLogger(__name__)


def parser() -> Parser:
    """The command's flags; what is left of the words are overrides of the sweep's own keys."""
    parser = Parser(
        prog="sweep",
        description="Run arms × grid × seeds; the same command goes on where it was stopped.",
        epilog="Any other key of the sweep is a flag: --evaluate.limit 10 --keep all.",
        allow_abbrev=False,
    )
    parser.add_argument("sweep", help="a sweep.py or .yaml (zoo:NAME: of the model zoo), or a plan, OUT/sweep.json")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="a recipe's key, for every run")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="these arms; the table holds all")
    parser.add_argument("--seeds", nargs="+", default=[], type=int, metavar="SEED", help="these seeds of the sweep's")
    parser.add_argument("--out", help="where everything goes, in place of the sweep's own")
    parser.add_argument(
        "--executor",
        choices=("local", "torchrun", "slurm"),
        default="local",
        help="local: worker processes; torchrun: one run after another, each on all GPUs; slurm: write a job array",
    )
    parser.add_argument("--nproc-per-node", type=int, help="processes of a training under torchrun; default one a GPU")
    parser.add_argument(
        "--cell", metavar="INDEX", help="run this cell alone (a number or a name), as a job of an array does"
    )
    parser.add_argument("--only-before", action="store_true", help="make what has to be there first, and stop")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and what is left of them, and stop")
    parser.add_argument("--table", action="store_true", help="write the table of what is there, and stop")
    parser.add_argument("--max-minutes", type=minutes, help="start no further run after so many minutes")
    parser.add_argument("--redo", action="store_true", help="start runs anew whose recipe has changed since")
    parser.add_argument("--workers", type=int, help="runs at a time; default one a GPU, or one a core")
    parser.add_argument("--threads", type=int, help="of each worker; default an equal share of the cores")
    return parser


def plan_from(options: Namespace, overrides: dict[str, object]) -> tuple[Plan, Sweep | None]:
    """The plan of a sweep file; or of a plan that was written before, which knows no ``before``."""
    file = Path(zoo_path(options.sweep))
    if file.suffix == ".json" and file.is_file():
        if overrides or options.override or options.out:
            raise UserError("a plan (sweep.json) takes no overrides: its recipes are resolved; give the sweep file")
        return Plan.read(file), None
    more = parse_overrides([f"--{word}" for word in options.override])
    sweep = read_sweep(file, overrides)
    for key in more:
        holders = [name for name, given in (("grid", sweep.grid), ("per_seed", sweep.per_seed)) if key in given]
        holders += [f"the arm '{name}'" for name, arm in read_arms(sweep, file.parent).items() if key in arm.overrides]
        if holders:
            raise UserError(f"--override {key}: {holders[0]} of the sweep sets it; change it there, or leave it out")
    sweep.overrides.update(more)
    out = Path(options.out or sweep.out or f"runs/sweeps/{sweep.name}")
    return plan_of(sweep, file.parent, out), sweep


def listed(plan: Plan, cells: Sequence[Cell]) -> str:
    """The cells, a line each: name, what is evaluated or trained, and what is there of it."""
    lines = []
    for cell in cells:
        state = "done" if plan.finished(cell) else "started" if plan.folder(cell).is_dir() else "to do"
        what = cell.model if cell.recipe is None else f"{cell.recipe['train']['steps']} steps"
        lines.append(
            f"{cell.name:40} {what!s:28} latents {', '.join(cell.latents):10} {changed(plan, cell) or state}\n"
        )
    done = sum(plan.finished(cell) for cell in cells)
    return "".join(lines) + f"{len(cells)} cells, {done} done -> {plan.out}\n"


def run(plan: Plan, sweep: Sweep | None, cells: Sequence[Cell], options: Namespace, words: Sequence[str]) -> bool:
    """Make what has to be there, then run the cells that are not finished; whether there is something to sum up.

    Args:
        words: of this command, for the scripts that call it again.
    """
    from laavit.sweeps.before import missing, prepare
    from laavit.sweeps.cell import redo
    from laavit.sweeps.launch import run_in_turn
    from laavit.sweeps.local import default_workers, run_local, shares
    from laavit.sweeps.slurm import write_array
    from laavit.sweeps.status import Status

    began = time.monotonic()
    for cell in cells:
        if options.redo:
            redo(plan, cell)
        elif why := changed(plan, cell):
            raise UserError(f"'{plan.folder(cell)}' is of another sweep: {why}; --redo starts it anew")
    todo = [cell for cell in cells if not plan.finished(cell)]
    workers = options.workers or default_workers()
    processes = options.nproc_per_node or max(1, torch.cuda.device_count())
    stages = sweep.stages if sweep is not None else []
    plan.write()
    if options.executor == "slurm" and todo and not options.only_before:
        given = sweep.slurm if sweep is not None else {}
        sys.stdout.write(write_array(plan, todo, given, processes, words, bool(missing(stages, todo, plan.out))))
        return False
    prepare(stages, todo, plan.out, workers, len(shares(workers, options.threads)[0]))
    check_stores(plan, todo)
    if options.only_before:
        return False
    deadline = None if options.max_minutes is None else began + 60 * options.max_minutes
    with Status(plan, todo, workers if options.executor == "local" else 1) as status:
        if options.executor == "torchrun":
            run_in_turn(plan, todo, status, processes, deadline)
        else:
            run_local(plan, todo, status, workers, options.threads, deadline)
    return True


def run_one(plan: Plan, name: str, processes: int | None) -> int:
    """Run one cell here, as a job of an array does; returns the exit code."""
    from laavit.sweeps.launch import run_in_turn
    from laavit.sweeps.status import Status

    cell = plan.cell(name)
    if plan.finished(cell):
        logger.info("%s is finished", cell.name)
        return 0
    with Status(plan, [cell]) as status:
        run_in_turn(plan, [cell], status, processes or max(1, torch.cuda.device_count()), None)
    return 1 if status.failed else 0


def finish(plan: Plan, cells: Sequence[Cell]) -> int:
    """The table, the failures, and what is left; returns the exit code."""
    from laavit.sweeps.status import FAILURES, write_failures
    from laavit.sweeps.table import write_table

    failed = write_failures(plan)
    table = write_table(plan)
    left = [cell for cell in cells if not plan.finished(cell) and cell.name not in failed]
    if table is not None:
        logger.info("table: %s", table)
    if left:
        logger.info("%d of %d cells are left; the same command goes on", len(left), len(cells))
    for name, error in failed.items():
        logger.error("failed: %s: %s", name, error)
    if failed:
        logger.error("%d failed, others are as they should be: %s", len(failed), plan.out / FAILURES)
    return 1 if failed else 0


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code: 1 where a cell failed."""
    options, words = parser().parse_known_args(list(argv))
    for name in ("workers", "threads", "nproc_per_node"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')}: got {given}; allowed: 1 or more")
    plan, sweep = plan_from(options, parse_overrides(words))
    if options.cell is not None:
        return run_one(plan, options.cell, options.nproc_per_node)
    cells = plan.pick(options.only, options.seeds)
    if not options.table:
        check_tasks(plan.evaluate)
    if options.dry_run:
        sys.stdout.write(listed(plan, cells))
        return 0
    if not options.table and not run(plan, sweep, cells, options, argv):
        return 0
    return finish(plan, cells)
