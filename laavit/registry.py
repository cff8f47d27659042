"""Every registry of laavit, each with the module that fills it, and the one error that users see.

A component is a class (or function) registered under its own name; ``registry/<kind>/<name>.yaml`` gives it a short
name with arguments, a description and a source. Modules are imported when a name is first asked for, so that
``laavit list`` costs no torch import of parts that are not used.

Adding one's own: ``from laavit.registry import GATES`` and ``@GATES.register_module()`` in any importable file that
the recipe names in ``custom_imports``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from mmengine.registry import Registry


class UserError(ValueError):
    """A mistake in what the user gave: one sentence, exit code 2, no traceback."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The sentence part that names what is allowed and, where there is one, the nearest name."""
    options = sorted(map(str, allowed))
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"allowed: {', '.join(options) or 'none'}{hint}"


class Kind(Registry):
    """An mmengine registry of one kind of component; unknown names raise a ``UserError`` with the nearest name."""

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
}
