"""The plan of a sweep: every cell with its resolved recipe, and where it keeps what.

``OUT/sweep.json`` is the plan, ``OUT/cells/<arm>-s<seed>/`` a run folder like any other.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track

from laavit.compatibility import check
from laavit.files import read_object, write_json
from laavit.paths import EXPORT_CARD
from laavit.recipe import Recipe, is_local, load_recipe, zoo_path
from laavit.registry import UserError, nearest
from laavit.sweeps.settings import Arm, Questions, Sweep, read_arms, seeds_of, with_seed

FILE = "sweep.json"
RECIPE = "recipe.json"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: an arm with one seed.

    Args:
        arm: the name of its row. label: what the table calls it.
        recipe: resolved and checked; None where ``model`` is evaluated as it is.
        latents: the modes it is evaluated in.
    """

    name: str
    arm: str
    label: str
    seed: int
    recipe: Mapping[str, Any] | None
    model: str | None
    latents: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """All cells of a sweep, in order, whatever part of them is run."""

    name: str
    out: Path
    cells: tuple[Cell, ...]
    evaluate: Questions
    keep: str = "export"
    reference: str | None = None
    title: str = ""

    def folder(self, cell: Cell) -> Path:
        """The run folder of a cell."""
        return self.out / "cells" / cell.name

    def evaluation(self, cell: Cell, mode: str) -> Path:
        """Where the records of one mode are, as ``laavit eval`` would name it."""
        protocol = None if self.evaluate.protocol == "lmms" else self.evaluate.protocol
        words = ("+".join(self.evaluate.tasks), protocol, "latents", mode)
        return self.folder(cell) / "eval" / "-".join(filter(None, words)).replace("/", "_")

    def model(self, cell: Cell) -> str:
        """What is evaluated."""
        return zoo_path(cell.model) if cell.model is not None else str(self.folder(cell) / "export")

    def finished(self, cell: Cell) -> bool:
        """Whether every output of a cell is there."""
        exported = cell.recipe is None or (self.folder(cell) / "export" / EXPORT_CARD).is_file()
        return exported and all(self.evaluated(cell, mode) for mode in self.modes(cell))

    def modes(self, cell: Cell) -> tuple[str, ...]:
        """The modes to evaluate a cell in; none where the sweep asks nothing."""
        return cell.latents if self.evaluate.tasks else ()

    def evaluated(self, cell: Cell, mode: str) -> bool:
        """Whether a mode has been answered, with the interventions that are asked for."""
        folder = self.evaluation(cell, mode)
        asked = ["summary.json", *(["interventions.json"] if self.evaluate.interventions and mode != "off" else [])]
        return all((folder / name).is_file() for name in asked)

    def pick(self, names: Iterable[str], seeds: Iterable[int]) -> list[Cell]:
        """The cells of some arms and some seeds; nothing named means all.

        Raises:
            UserError: no arm, or no cell, has that name, or no seed of it.
        """
        arms, wanted = list(dict.fromkeys(cell.arm for cell in self.cells)), list(names)
        for name in wanted:
            if name not in arms:
                raise UserError(f"--only: the sweep has no arm '{name}'; {nearest(name, arms)}")
        known, given = {cell.seed for cell in self.cells}, list(seeds)
        for seed in given:
            if seed not in known:
                raise UserError(f"--seeds: the sweep has no seed {seed}; allowed: {', '.join(map(str, sorted(known)))}")
        rows = [cell for cell in self.cells if not wanted or cell.arm in wanted]
        alone = Counter(cell.arm for cell in rows)  # a model that has no seed belongs to all of them
        return [c for c in rows if not given or c.seed in given or (c.model is not None and alone[c.arm] == 1)]

    def cell(self, name: str) -> Cell:
        """A cell by its name or its number from 0.

        Raises:
            UserError: there is none.
        """
        found = {cell.name: cell for cell in self.cells} | {str(i): cell for i, cell in enumerate(self.cells)}
        if name not in found:
            raise UserError(f"--cell: the sweep has no cell '{name}'; {nearest(name, [c.name for c in self.cells])}")
        return found[name]

    def write(self) -> None:
        """Write OUT/sweep.json."""
        content = {field: getattr(self, field) for field in ("name", "keep", "reference", "title")}
        cells = [asdict(cell) for cell in self.cells]
        write_json(self.out / FILE, {**content, "evaluate": asdict(self.evaluate), "cells": cells})

    @classmethod
    def read(cls, file: Path) -> Plan:
        """Raises: UserError: it is no plan."""
        content = read_object(file)
        if "cells" not in content:
            raise UserError(f"'{file}' is no plan of a sweep; `laavit sweep sweep.py` writes OUT/{FILE}")
        questions: dict[str, Any] = content.pop("evaluate")
        questions = {key: tuple(value) if isinstance(value, list) else value for key, value in questions.items()}
        cells = tuple(Cell(**{**cell, "latents": tuple(cell["latents"])}) for cell in content.pop("cells"))
        return cls(out=file.parent, cells=cells, evaluate=Questions(**questions), **content)


def plan_of(sweep: Sweep, beside: Path, out: Path) -> Plan:
    """Every cell of a sweep, its recipe resolved and checked, before any of them starts.

    Seed by seed: a sweep that is stopped early has whole rows of few seeds, and neighbours share samples and weights.

    Args:
        beside: the folder of the sweep file.

    Raises:
        UserError: a recipe is not right or its parts do not fit one another; it names the cell.
    """
    arms = read_arms(sweep, beside)
    every = list(dict.fromkeys([*sweep.seeds, *(seed for arm in arms.values() for seed in arm.seeds or ())]))
    todo = [
        (arm, row, more, seed)
        for seed in every
        for name, arm in arms.items()
        for row, more in _variants(name, arm, sweep)
        if seed in seeds_of(arm, sweep)
    ]
    steps = track(todo, "recipes", console=Console(stderr=True), transient=True)
    cells = tuple(_cell(sweep, arm, row, more, seed) for arm, row, more, seed in steps)
    for name, count in Counter(cell.name for cell in cells).items():
        if count > 1:
            raise UserError(f"two cells of the sweep are called '{name}'; give the arms other names")
    rows = list(dict.fromkeys(cell.arm for cell in cells))
    if sweep.reference is not None and sweep.reference not in rows:
        raise UserError(f"reference: the sweep has no arm '{sweep.reference}'; {nearest(sweep.reference, rows)}")
    return Plan(sweep.name, out, cells, sweep.evaluate, sweep.keep, sweep.reference, sweep.title or sweep.name)


def _variants(name: str, arm: Arm, sweep: Sweep) -> Iterator[tuple[str, dict[str, Any]]]:
    """An arm's rows: itself, or one for every combination of the grid's values, with what these override."""
    if arm.model is not None or not sweep.grid:
        yield name, {}
        return
    last = Counter(key.rpartition(".")[2] for key in sweep.grid)
    short = {key: key.rpartition(".")[2] if last[key.rpartition(".")[2]] == 1 else key for key in sweep.grid}
    for values in itertools.product(*sweep.grid.values()):
        chosen = dict(zip(sweep.grid, values))
        words = [f"{short[key]}={value}" for key, value in chosen.items()]
        yield "+".join([name] * (len(sweep.arms) > 1) + words), chosen


def _cell(sweep: Sweep, arm: Arm, name: str, grid: Mapping[str, Any], seed: int) -> Cell:
    label = arm.label if not grid else name
    folder = re.sub(r"[^\w.=+-]", "_", name) + f"-s{seed}"
    if arm.model is not None:
        wanted = arm.latents or sweep.evaluate.latents[:1]
        return Cell(folder, name, label or name, seed, None, with_seed(arm.model, seed), tuple(wanted))
    drawn = {key: yaml.safe_load(with_seed(text, seed)) for key, text in sweep.per_seed.items()}
    overrides = {**sweep.overrides, **arm.overrides, **grid, **drawn, "seed": seed, "title": name}
    assert arm.recipe is not None, "read_arms gives every arm a recipe or a model"
    try:
        recipe = load_recipe(arm.recipe, overrides)
        check(recipe)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    wanted = arm.latents or sweep.evaluate.latents
    latents = tuple(wanted) if recipe.has("latents") else tuple(mode for mode in wanted if mode == "on") or ("on",)
    return Cell(folder, name, label or name, seed, json.loads(recipe.text()), None, latents)


def changed(plan: Plan, cell: Cell) -> str | None:
    """Why what a cell's folder holds is of another plan; None where it goes on as it is."""
    folder = plan.folder(cell)
    if (folder / RECIPE).is_file() and cell.recipe is not None:
        # Read as a recipe, so that a setting that did not exist then has its default.
        before, now = (_flat(each) for each in (json.loads(load_recipe(folder / RECIPE).text()), cell.recipe))
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if keys:
            return f"its recipe was another one ({', '.join(keys[:4])})"
    for mode in plan.modes(cell):
        summary = read_object(plan.evaluation(cell, mode) / "summary.json")
        if summary and summary.get("limit") != plan.evaluate.limit:
            return f"evaluate.limit was {summary.get('limit')} and is {plan.evaluate.limit}"
        if summary and cell.model is not None and summary.get("model") != plan.model(cell):
            return f"its model was '{summary.get('model')}'"
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix.rstrip("."): value}
    return {key: each for name, part in value.items() for key, each in _flat(part, f"{prefix}{name}.").items()}


def check_stores(plan: Plan, cells: Iterable[Cell]) -> None:
    """What ``before`` was to make is there: the trace stores, the annotations, and local models.

    Raises:
        UserError: it names the cell, and what is not there.
    """
    from laavit.traces.shards import read_header

    for cell in cells:
        if plan.finished(cell):
            continue
        if cell.recipe is None:
            if is_local(str(cell.model)) and not Path(plan.model(cell)).is_dir():
                raise UserError(f"{cell.name}: there is no model at '{cell.model}'; 'before' can make it")
            continue
        config = cell.recipe
        annotations = (config.get("data") or {}).get("annotations")
        if annotations is not None and "://" not in annotations and not Path(annotations).exists():
            raise UserError(f"{cell.name}: there are no annotations at '{annotations}'; 'before' can make them")
        parts = {name: Recipe(config).build(f"targets.{name}") for name in config["targets"]}
        needed = {target.store for target in parts.values() if target.needs_trace}
        shared = config["traces"]["path"] if None in needed or config["traces"]["select"] else None
        for path in filter(None, [shared, *sorted(needed - {None})]):
            if not path.startswith("hf://") and read_header(Path(path)) is None:
                raise UserError(f"{cell.name}: there is no trace store at '{path}'; 'before' can make it")


def check_tasks(questions: Questions) -> None:
    """Every task is known, before the first run.

    Raises:
        UserError: one is not; it names the nearest.
    """
    from laavit.evaluation.tasks import near_tasks, task_manager

    if questions.tasks:
        known = set(task_manager(questions.include_path, questions.tasks).all_tasks)
        for task in questions.tasks:
            if task not in known:
                raise UserError(f"evaluate.tasks: no task is called '{task}'; {near_tasks(task, known)}")
