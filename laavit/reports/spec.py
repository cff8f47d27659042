"""A published table as data: ``eval/tables/*.yaml``, read and checked.

title, source     what it is, and whose figures ``paper`` are; without a source there may be none
columns           name: the heading; task: a benchmark's name; kind: questions of this kind only; also: other tasks or
                  kinds that ask the same questions; score: micro (right answers / questions) or another figure of
                  eval/benchmarks.yaml; n: questions; image: a regular expression whose first group, in a question's
                  id, names its image; reason: why this score
rows              name: what ROW=RUN says; label; params; paper: printed figures as strings, one a column, ~ where
                  there is none; marks: column -> what is odd about a printed figure; recipe: titles of the recipes
                  that this row is made with; latents: on or off; where: keys that such a recipe must have
reference         the rows that the others are compared with
notes             sentences below the table
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from laavit.evaluation.benchmarks import benchmarks
from laavit.paths import project_data
from laavit.registry import UserError, nearest

MICRO = "micro"


@dataclass(frozen=True)
class Column:
    """One column: which questions, and which figure of them."""

    name: str
    task: str
    kind: str | None = None
    also: Sequence[Mapping[str, str]] = ()
    score: str = MICRO
    n: int | None = None
    image: str | None = None
    reason: str = ""

    @property
    def places(self) -> list[tuple[str, str | None]]:
        """The (task, kind) pairs under which its questions may be recorded, the first being its own."""
        return [(self.task, self.kind), *((one["task"], one.get("kind")) for one in self.also)]

    @property
    def figure(self) -> Mapping[str, Any]:
        """How its score is made of right and wrong answers; {} for micro."""
        entry = benchmarks().get(self.task)
        return entry.figures[self.score] if entry and self.score != MICRO else {}


@dataclass(frozen=True)
class Line:
    """One row: its printed figures by column name, and what runs it is made of."""

    name: str
    label: str
    params: str = ""
    paper: Mapping[str, str] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    recipe: tuple[str, ...] = ()
    latents: str = "on"
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sheet:
    """A whole table."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Line, ...]
    source: str = ""
    reference: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def line(self, name: str) -> Line:
        """A row by its name.

        Raises:
            UserError: there is none.
        """
        for line in self.rows:
            if line.name == name:
                return line
        raise UserError(f"table '{self.name}' has no row '{name}'; {nearest(name, [line.name for line in self.rows])}")


def sheet_names() -> dict[str, Path]:
    """The tables by name (files of ``eval/tables`` that have rows)."""
    files = sorted((project_data("eval") / "tables").glob("*.yaml"))
    return {file.stem: file for file in files if re.search(r"^rows:", file.read_text(encoding="utf-8"), re.M)}


def load_sheet(name: str | Path) -> Sheet:
    """A table by its name, or from a file of one's own.

    Raises:
        UserError: it does not exist, or something in it is not right.
    """
    known = sheet_names()
    file = Path(name) if str(name).endswith((".yaml", ".yml")) else known.get(str(name))
    if file is None or not file.is_file():
        raise UserError(f"there is no table '{name}'; {nearest(str(name), known)}, or a .yaml file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"'{file}' is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"'{file}' is no table: it has to be a mapping with title, columns and rows")
    return _sheet(content, file)


def _sheet(content: dict[str, Any], file: Path) -> Sheet:
    where = f"'{file}'"
    _keys(content, Sheet, where, ("title", "columns", "rows"), but=("name",))
    columns = tuple(_column(one, f"{where}, column {i}") for i, one in enumerate(content["columns"], 1))
    _once([column.name for column in columns], f"{where} has two columns")
    rows = tuple(_line(one, columns, f"{where}, row {i}") for i, one in enumerate(content["rows"], 1))
    _once([line.name for line in rows], f"{where} has two rows")
    source = str(content.get("source", ""))
    for line in rows:
        if line.paper and not (line.source or source):
            raise UserError(
                f"{where}, row '{line.name}' has printed figures and no source; give the table or the row one"
            )
    found = Sheet(
        name=file.stem,
        title=str(content["title"]),
        columns=columns,
        rows=rows,
        source=source,
        reference=tuple(_listed(content.get("reference", ()))),
        notes=tuple(_listed(content.get("notes", ()))),
    )
    for name in found.reference:
        found.line(name)
    return found


def _column(given: Any, where: str) -> Column:
    _keys(given, Column, where, ("name", "task"))
    column = Column(**given)
    for task, _ in column.places:
        if task not in known_tasks():
            raise UserError(f"{where} ('{column.name}') asks the unknown task '{task}'; {_near(task)}")
    entry = benchmarks().get(column.task)
    figures = {MICRO: {}, **(entry.figures if entry else {})}
    able = [name for name, spec in figures.items() if name == MICRO or _able(spec)]
    if column.score not in able:
        raise UserError(f"{where} ('{column.name}') wants the score '{column.score}'; {nearest(column.score, able)}")
    if entry and column.n not in (None, entry.questions):
        raise UserError(
            f"{where} ('{column.name}') has n = {column.n}; '{column.task}' has {entry.questions} questions"
        )
    try:
        grouped = column.image is None or re.compile(column.image).groups >= 1
    except re.error as error:
        raise UserError(f"{where} ('{column.name}'): image is no regular expression: {error}") from error
    if not grouped:
        raise UserError(
            f"{where} ('{column.name}'): image '{column.image}' has no group; put one around the image's name"
        )
    return column


def _able(spec: Mapping[str, Any]) -> bool:
    """Whether a figure can be redrawn by questions: the mean over one group, or groups that are all right."""
    return "where" not in spec and ("all" in spec or len(spec.get("mean", ())) == 1)


def _line(given: Any, columns: Sequence[Column], where: str) -> Line:
    _keys(given, Line, where, ("name", "label"))
    where = f"{where} ('{given['name']}')"
    figures = given.get("paper") or [None] * len(columns)
    if len(figures) != len(columns):
        raise UserError(f"{where} has {len(figures)} printed figures for {len(columns)} columns; ~ stands for none")
    paper = {column.name: str(figure) for column, figure in zip(columns, figures) if figure is not None}
    for figure in paper.values():
        if not re.fullmatch(r"\d+(\.\d+)?", figure):
            raise UserError(f"{where} has the printed figure '{figure}'; a number in quotes is expected, as printed")
    marks = given.get("marks") or {}
    for name in marks:
        if name not in paper:
            raise UserError(f"{where} marks '{name}', where nothing is printed; {nearest(name, paper)}")
    # YAML reads a bare on and off as true and false
    latents = {True: "on", False: "off"}.get(given.get("latents", True), str(given.get("latents")))
    own = {
        "paper": paper,
        "marks": marks,
        "recipe": tuple(_listed(given.get("recipe", ()))),
        "latents": latents,
        "params": str(given.get("params", "")),
    }
    return Line(**{**given, **own})


def _keys(given: Any, kind: Any, where: str, needed: Sequence[str], but: Sequence[str] = ()) -> None:
    """A mapping with the keys of a class.

    Raises:
        UserError: it is none, a key is unknown, or one is missing.
    """
    if not isinstance(given, dict):
        raise UserError(f"{where} is a {type(given).__name__}; a mapping is expected")
    known = [one.name for one in fields(kind) if one.name not in but]
    for key in given:
        if key not in known:
            raise UserError(f"{where} has the unknown key '{key}'; {nearest(key, known)}")
    for key in needed:
        if not given.get(key):
            raise UserError(f"{where} lacks '{key}'")


def _once(names: Iterable[str], what: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{what} called '{name}'; a name stands for one")


def _listed(value: Any) -> list[str]:
    return [str(value)] if isinstance(value, str) else [str(one) for one in value]


def _near(task: str) -> str:
    return nearest(task, known_tasks())


@lru_cache(maxsize=1)
def known_tasks() -> frozenset[str]:
    """The benchmarks by name, and the project's own tasks (``eval/tasks``)."""
    own = set()
    for file in (project_data("eval") / "tasks").rglob("*.yaml"):
        own |= set(re.findall(r"^task:\s*[\"']?([\w-]+)[\"']?\s*$", file.read_text(encoding="utf-8"), re.M))
    return frozenset(own | set(benchmarks()))


def countable(printed: str, n: int) -> bool:
    """Whether a printed percentage is k / n for a whole k, rounded to the digits printed."""
    digits = len(printed.partition(".")[2])
    share, half = float(printed) / 100, 0.5 * 10.0**-digits / 100 + 1e-12
    return any(abs(k / n - share) <= half for k in (int(share * n), int(share * n) + 1) if k <= n)
