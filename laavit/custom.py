"""Parts in a user's own files: a recipe's ``custom_imports``, an evaluation's ``--import``. They are executed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from laavit.registry import MISTAKES, UserError, mistake

#: what the name of a module begins with that is a file; the rest is its full path
FILE = "laavit_custom:"


class _Files:
    """Finds such a module by its name, in whatever process: a spawned worker or Ray unpickles a user's class so."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if not name.startswith(FILE):
            return None
        return importlib.util.spec_from_file_location(name, unquote(name.removeprefix(FILE)))


sys.meta_path.append(_Files)


def import_custom(spec: Any, beside: Path, key: str = "custom_imports") -> list[str]:
    """Import modules, or ``.py`` files beside a folder; returns them, files by full path.

    Args:
        spec: one, several, or mmengine's dict(imports=[...]). key: where they were named, for messages.

    Raises:
        UserError: one cannot be imported, with its own reason.
    """
    names = spec.get("imports", []) if isinstance(spec, Mapping) else spec
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{key}: got {spec!r}; allowed: a list of modules and .py files")
    found = [str((beside / name).resolve()) if name.endswith(".py") else name for name in names]
    for name in found:
        _import(name, key)
    return found


def _import(name: str, key: str) -> None:
    """Import a module once: a second execution would register every class twice."""
    module = name
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"{key}: no file '{name}'")
        module = FILE + quote(name).replace(".", "%2E")  # a dot would stand for a package
    try:
        importlib.import_module(module)
    except MISTAKES as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise UserError(f"{key}: no module '{name}' ({error})") from None
        raise UserError(f"{key}: '{name}' cannot be imported: {mistake(error)}") from error
