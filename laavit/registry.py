"""Every registry of laavit, each with the module that fills it, and the one error that users see.

A component is a class (or function) registered under its own name; ``registry/<kind>/<name>.yaml`` gives it a short
name with arguments, a description and a source. Modules are imported when a name is first asked for, so that
``laavit list`` costs no torch import of parts that are not used.

Adding one's own: ``from laavit.registry import GATES`` and ``@GATES.register_module()`` in any importable file that
the recipe names in ``custom_imports``, or in an installed plug-in, whose module is an entry point of the group
``laavit.components`` (docs/extending.md).
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from mmengine.registry import Registry

#: the entry-point group of installed plug-ins
PLUGINS = "laavit.components"
#: what a mistake in a file of somebody else's raises when it is executed
MISTAKES = (
    SyntaxError,
    NameError,
    ImportError,
    AttributeError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)


class UserError(ValueError):
    """A mistake in what the user gave: one sentence, exit code 2, no traceback."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The sentence part that names what is allowed and, where there is one, the nearest name."""
    options = sorted(map(str, allowed))
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"allowed: {', '.join(options) or 'none'}{hint}"


def sentence(error: UserError) -> str:
    """The error's sentence; torch wraps what a data worker raises into its traceback, whose last line it is."""
    text = str(error).strip()
    return text.splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text


def mistake(error: BaseException) -> str:
    """What went wrong in somebody else's file, in one line: 'NameError: ...'; a ``UserError`` speaks for itself."""
    what = " ".join(str(error).split())
    return what if isinstance(error, UserError) else f"{type(error).__name__}: {what}"


@dataclass(frozen=True)
class Plugin:
    """An installed plug-in: who brought it, and its package's folder ``registry/`` of named parts, where it has one."""

    owner: str
    registry: Path | None


@lru_cache
def plugins() -> tuple[Plugin, ...]:
    """The installed plug-ins, imported, in the order of their names.

    Raises:
        UserError: one cannot be imported, is no module, or its ``registry/`` has a folder of an unknown kind.
    """
    points = sorted(entry_points(group=PLUGINS), key=lambda point: point.name)
    return tuple(_plugin(point) for point in points)


def _plugin(point: Any) -> Plugin:
    owner = f"the plug-in '{point.name}' (distribution '{point.dist.name}')"
    try:
        module = point.load()
    except MISTAKES as error:
        raise UserError(f"{owner} cannot be loaded: {mistake(error)}") from error
    if not isinstance(module, ModuleType):
        raise UserError(
            f"{owner} names '{point.value}', which is no module; allowed: a module that registers its parts"
        )
    # Only a package has a folder of its own; beside a single file there is everybody's site-packages.
    places = getattr(sys.modules.get(module.__package__ or ""), "__path__", ())
    folder = next((found for place in places if (found := Path(place) / "registry").is_dir()), None)
    for kind in sorted(folder.iterdir()) if folder is not None else ():
        if kind.is_dir() and kind.name not in KINDS:
            raise UserError(f"{owner}: no kind of component is called '{kind.name}'; {nearest(kind.name, KINDS)}")
    return Plugin(owner, folder)


class Kind(Registry):
    """An mmengine registry of one kind of component; unknown names raise a ``UserError`` with the nearest name."""

    def import_from_location(self) -> None:
        """Import laavit's own parts and the installed plug-ins; asked for by every look-up, done once."""
        super().import_from_location()
        plugins()

    def _register_module(self, module: Any, module_name: Any = None, force: bool = False) -> None:
        """As mmengine's, but laavit's own parts come first, whenever a part from outside is registered.

        Raises:
            UserError: the name is taken; it says by whom.
        """
        if not str(getattr(module, "__module__", "")).startswith("laavit."):
            super().import_from_location()
        try:
            super()._register_module(module, module_name, force)
        except KeyError as error:
            raise UserError(f"{error.args[0]}; register it under another name") from None

    def find(self, name: str) -> Any:
        """The registered class called ``name``.

        Raises:
            UserError: nothing of this kind has that name.
        """
        found = self.get(name)
        if found is None:
            raise UserError(f"no {self.name} is called '{name}'; {nearest(name, self.module_dict)}")
        return found


TEACHERS = Kind("teacher", scope="laavit", locations=["laavit.teachers"])
STUDENTS = Kind("student", scope="laavit", locations=["laavit.students"])
LATENTS = Kind("latents", scope="laavit", locations=["laavit.latents"])
TARGETS = Kind("target", scope="laavit", locations=["laavit.targets"])
GATES = Kind("gate", scope="laavit", locations=["laavit.gates"])
DATASETS = Kind("data", scope="laavit", locations=["laavit.data"])
FILTERS = Kind("filter", scope="laavit", locations=["laavit.traces.filters"])
JUDGES = Kind("judge", scope="laavit", locations=["laavit.traces.judges"])
INTERVENTIONS = Kind("intervention", scope="laavit", locations=["laavit.evaluation.interventions"])
STRATEGIES = Kind("strategy", scope="laavit", locations=["laavit.engine.strategies"])
SETTINGS = Kind(
    "section",
    scope="laavit",
    locations=["laavit.backbones", "laavit.data", "laavit.teachers", "laavit.engine", "laavit.evaluation"],
)
FAMILIES = Kind("family", scope="laavit", locations=["laavit.backbones.families"])

#: folder of ``registry/`` -> registry; the recipe's key of a single component has the folder's singular name.
KINDS: dict[str, Kind] = {
    "teachers": TEACHERS,
    "students": STUDENTS,
    "latents": LATENTS,
    "targets": TARGETS,
    "gates": GATES,
    "data": DATASETS,
    "filters": FILTERS,
    "judges": JUDGES,
    "interventions": INTERVENTIONS,
    "strategies": STRATEGIES,
}
