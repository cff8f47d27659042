"""Which runs make which row of a table: as the user says (ROW=RUN,RUN), or by what a run calls itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laavit.registry import UserError, nearest
from laavit.reports.runs import SWEEP, Run, load_run, load_sweep, split_word
from laavit.reports.spec import Line, Sheet
from laavit.reports.tables import flatten

logger = logging.getLogger(__name__)

#: what may differ between two seeds of one row
PLACES = ("seed", "title", "data.annotations", "data.root", "traces.path", "traces.vision_cache", "traces.keep")
#: settings of the training that do not change what is learned
_TRAIN = ("seed", "workers", "checkpoint", "keep", "log", "threads", "tensorboard", "device")
LOOSE = (
    *("student.seed", "latents.seed", "extract.", "eval.", "custom_imports"),
    *(f"train.{name}" for name in _TRAIN),
)


def match(sheet: Sheet, words: Sequence[Path | str]) -> dict[str, list[Run]]:
    """The runs of each row.

    A run that is given alone belongs to the rows that name its recipe's title (its arm, in a sweep; else its folder's
    name) and whose ``where`` its recipe fulfils.

    Args:
        words: run folders, sweeps, and ROW=RUN or ROW=RUN,RUN.

    Raises:
        UserError: a row or folder does not exist, a run alone fits no row, or runs of a row are no seeds of one arm.
    """
    found: dict[str, list[Run]] = {}
    for word in words:
        name, folders = split_word(word)
        if name is not None:
            line = sheet.line(name)
            runs = [load_run(folder, line.label) for folder in folders]
            found.setdefault(line.name, []).extend(runs)
            for other in _shared(sheet, line):
                found.setdefault(other.name, []).extend(runs)
            continue
        sweep = (folders[0] / SWEEP).is_file()
        for run in load_sweep(folders[0]) if sweep else [load_run(folders[0])]:
            lines = lines_of(sheet, run)
            if not lines and sweep:
                logger.warning("table '%s' has no row for the arm '%s'", sheet.name, run.arm)
            elif not lines:
                raise UserError(_unmatched(sheet, run))
            for line in lines:
                found.setdefault(line.name, []).append(run)
    for name, runs in found.items():
        _seeds(name, runs)
    return found


def lines_of(sheet: Sheet, run: Run) -> list[Line]:
    """The rows that a run belongs to: its own, and that of the same recipe with its latents off."""
    names = [run.arm] if run.arm else [run.title, run.path.name]
    for name in names:
        named = [line for line in sheet.rows if name in (*line.recipe, line.name)]
        fitting = [line for line in named if _fits(line, run.recipe)]
        if fitting:
            return fitting
    return []


def _shared(sheet: Sheet, line: Line) -> list[Line]:
    """Rows made of the same runs, looked at in another way."""
    return [
        other
        for other in sheet.rows
        if other is not line and line.recipe and (other.recipe, other.where) == (line.recipe, line.where)
        and other.latents != line.latents
    ]  # fmt: skip


def _fits(line: Line, recipe: Mapping[str, Any]) -> bool:
    return not recipe or all(_value(recipe, key) == wanted for key, wanted in line.where.items())


def _value(recipe: Mapping[str, Any], key: str) -> Any:
    """A key such as 'latents.count'; None where a part is left out."""
    found: Any = recipe
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _unmatched(sheet: Sheet, run: Run) -> str:
    named = [line for line in sheet.rows if run.title in (*line.recipe, line.name)]
    if named:
        line = named[0]
        differs = [
            f"{key} = {_value(run.recipe, key)}"
            for key, wanted in line.where.items()
            if _value(run.recipe, key) != wanted
        ]
        said = f"is called '{run.title}', but its {' and '.join(differs)}, so it is not the row '{line.name}'"
    else:
        rows = [name for line in sheet.rows for name in (line.name, *line.recipe)]
        said = f"is called '{run.title}', which no row of table '{sheet.name}' is; {nearest(run.title, set(rows))}"
    return f"'{run.path}' {said}; say which row it is: ROW={run.path}"


def _of_any_seed(recipe: Mapping[str, str]) -> dict[str, str]:
    """A flat recipe whose paths say {seed} where they name its own: a sweep gives each seed a student of its own."""
    own = re.compile(rf"(?<!\d){re.escape(recipe.get('seed', ''))}(?!\d)")
    return {
        key: own.sub("{seed}", value) if "/" in value and "seed" in recipe else value for key, value in recipe.items()
    }


def _seeds(name: str, runs: Sequence[Run]) -> None:
    """Two runs of a row differ in nothing but the seed, paths that name it, and where things lie.

    Raises:
        UserError: they do, or one run was given twice.
    """
    paths = [run.path.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise UserError(f"row '{name}' was given one run twice")
    flat = [(run, _of_any_seed(flatten(run.recipe))) for run in runs if run.recipe]
    for run, other in flat[1:]:
        first = flat[0][1]
        differs = [
            key
            for key in dict.fromkeys((*first, *other))
            if _told(key, first, other) and key not in PLACES and not key.startswith(LOOSE)
        ]
        if differs:
            one, two = (recipe.get(differs[0], "not there") for recipe in (first, other))
            raise UserError(
                f"row '{name}' was given {flat[0][0].path} and {run.path}, which are no seeds of one arm: "
                f"{differs[0]} is {one} and {two}"
            )


def _told(key: str, first: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether a key differs. One that a recipe lacks is a setting it does not know yet, but a part is there or not."""
    if key in first and key in other:
        return first[key] != other[key]
    return key.endswith(".type")
