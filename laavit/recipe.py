"""A recipe: read ``cfg.py``, apply overrides, resolve names, check every argument, build.

A recipe is an mmengine Config of plain data (``_base_`` works as usual). Its keys are

* components: ``student``, ``teacher``, ``latents``, ``gate``, ``data``, ``strategy``, and the mappings ``targets``
  and ``filters``. Each is ``dict(name='cosine', warmup=200)``, where ``name`` is ``registry/<kind>/<name>.yaml``, or
  ``dict(type='MyGate', ...)`` for a registered class; a bare string is a name; ``None`` leaves the part out;
* settings: ``prompt``, ``traces``, ``extract``, ``train``, ``eval``: dataclasses registered in ``SETTINGS``;
* ``seed``, ``title``, ``custom_imports`` (modules or files beside the recipe, executed: only run recipes you trust).

Everything is checked against the signatures with jsonargparse before anything is built.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from mmengine.config import Config

from laavit.custom import import_custom
from laavit.paths import project_data
from laavit.registry import KINDS, MISTAKES, SETTINGS, Kind, UserError, nearest, plugins

#: recipe key -> folder of ``registry/``
COMPONENTS = {
    "student": "students",
    "teacher": "teachers",
    "latents": "latents",
    "gate": "gates",
    "data": "data",
    "strategy": "strategies",
}
MAPPINGS = {"targets": "targets", "filters": "filters"}
SECTIONS = ("prompt", "traces", "extract", "train", "eval")
PLAIN = {"seed": int, "title": str}
IMPORTS = "custom_imports"


@dataclass(frozen=True)
class Card:
    """One file of ``registry/``: a name for a class with arguments."""

    kind: str
    name: str
    type: str
    args: Mapping[str, Any]
    description: str
    source: str


@lru_cache
def cards(kind: str) -> Mapping[str, Card]:
    """All named parts of a kind by name: laavit's folder of ``registry/``, then those of the installed plug-ins.

    Raises:
        UserError: the kind does not exist, a file lacks ``type`` or ``description``, or a plug-in's name is taken.
    """
    if kind not in KINDS:
        raise UserError(f"no kind of component is called '{kind}'; {nearest(kind, KINDS)}")
    folders = {"laavit": project_data("registry")}
    folders |= {plugin.owner: plugin.registry for plugin in plugins() if plugin.registry is not None}
    found: dict[str, Card] = {}
    owners: dict[str, str] = {}
    for owner, folder in folders.items():
        for card in _read_cards(kind, folder / kind, owner):
            if card.name in found:
                raise UserError(f"{owner} brings {kind}/{card.name}, a name that {owners[card.name]} has already")
            found[card.name], owners[card.name] = card, owner
    return found


def _read_cards(kind: str, folder: Path, owner: str) -> Iterator[Card]:
    for path in sorted(folder.glob("*.yaml")):
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            what = " ".join(str(error).split())
            raise UserError(f"{path.name} in registry/{kind} of {owner} is no YAML: {what}") from None
        missing = [key for key in ("type", "description", "source") if key not in (data or {})]
        if missing:
            raise UserError(f"{path.name} in registry/{kind} of {owner} lacks {', '.join(missing)}")
        yield Card(kind, path.stem, data["type"], data.get("args", {}), data["description"], data["source"])


def zoo_path(path: str) -> str:
    """``zoo:microlab/teacher`` -> the folder of the shipped model zoo; any other string is returned as it is."""
    return str(project_data("model_zoo") / path.removeprefix("zoo:")) if path.startswith("zoo:") else path


def is_local(path: str) -> bool:
    """Whether a model's name can only be a folder here: the hub's names are NAME or OWNER/NAME."""
    return path.startswith(("zoo:", "/", ".", "~")) or path.count("/") > 1


def resolve(key: str, kind: str, spec: object) -> dict[str, Any]:
    """A component of a recipe -> ``dict(type=..., **arguments)`` with names looked up, arguments not yet checked.

    Raises:
        UserError: naming the recipe's key, what was given, what is allowed and the nearest name.
    """
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise UserError(f"{key}: got {spec!r}; a component is a name or dict(name=..., arguments)")
    args = {k: v for k, v in spec.items() if k not in ("name", "type")}
    if ("name" in spec) == ("type" in spec):
        raise UserError(
            f"{key}: got {dict(spec)!r}; a component has either 'name' (in registry/{kind}) or 'type' (a class), "
            "and dict(_delete_=True, ...) replaces a base's component whole"
        )
    if "type" in spec:
        return {"type": spec["type"], **args}
    known = cards(kind)
    if spec["name"] not in known:
        raise UserError(f"{key}: no {KINDS[kind].name} is called '{spec['name']}'; {nearest(spec['name'], known)}")
    card = known[spec["name"]]
    return {"type": card.type, **copy.deepcopy(dict(card.args)), **args}


def checked(key: str, cls: type, args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a class with its defaults filled in, names and types checked by jsonargparse.

    Raises:
        UserError: an unknown name, a wrong type or a missing argument, in one line that starts with the recipe's key.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "c")
    allowed = [
        name
        for name, p in inspect.signature(cls).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    for name in args:
        if name not in allowed:
            raise UserError(f"{key}.{name}: {cls.__name__} takes no '{name}'; {nearest(name, allowed)}")
    try:
        values = parser.parse_object({"c": dict(args)}).as_dict().get("c", {})
    except ArgumentError as error:
        text = " ".join(line.strip() for line in str(error).splitlines())
        text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
        named = re.fullmatch(r'Parser key "c\.([\w.]+)": (.*)', text)
        where, said = (f"{key}.{named[1]}", named[2]) if named else (key, re.sub(r"\bc\.", f"{key}.", text))
        raise UserError(f"{where}: {said}") from None
    # jsonargparse's numbers of a limited range are of classes of their own, which YAML does not know
    return {name: float(value) if isinstance(value, float) else value for name, value in values.items()}


class Recipe:
    """A resolved and checked recipe; ``config`` is plain data with every default written out.

    Args:
        config: the raw mapping, as read from the file with overrides applied.
        path: the file it came from, for messages and for files named beside it.
    """

    def __init__(self, config: Mapping[str, Any], path: Path | None = None) -> None:
        self.path = path
        raw = {key: value for key, value in config.items() if key != IMPORTS}
        allowed = [*COMPONENTS, *MAPPINGS, *SECTIONS, *PLAIN, IMPORTS]
        for key in raw:
            if key not in allowed:
                raise UserError(f"{key}: no such key in a recipe; {nearest(key, allowed)}")
        self.config: dict[str, Any] = {"seed": 0, "title": path.stem if path else ""}
        for key, kind in PLAIN.items():
            if key in raw:
                if not isinstance(raw[key], kind) or isinstance(raw[key], bool):
                    raise UserError(f"{key}: expected {kind.__name__}, got {raw[key]!r}")
                self.config[key] = raw[key]
        for key, kind_name in COMPONENTS.items():
            self.config[key] = self._component(key, kind_name, raw.get(key))
        for key, kind_name in MAPPINGS.items():
            given = raw.get(key) or {}
            if not isinstance(given, Mapping):
                raise UserError(f"{key}: expected dict(NAME=component, ...), got {given!r}")
            parts = {name: self._component(f"{key}.{name}", kind_name, spec) for name, spec in given.items()}
            self.config[key] = {name: part for name, part in parts.items() if part is not None}
        for key in SECTIONS:
            given = raw.get(key) or {}
            if not isinstance(given, Mapping):
                raise UserError(f"{key}: expected dict(setting=value, ...), got {given!r}")
            self.config[key] = checked(key, SETTINGS.find(key), given)
        if IMPORTS in config:
            self.config[IMPORTS] = config[IMPORTS]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled in another process, a recipe brings its ``custom_imports`` along."""
        self.__dict__.update(state)
        if IMPORTS in self.config:
            import_custom(self.config[IMPORTS], Path())

    @staticmethod
    def _component(key: str, kind: str, spec: object) -> dict[str, Any] | None:
        if spec is None:
            return None
        resolved = resolve(key, kind, spec)
        type_name = resolved.pop("type")
        cls = _find(key, KINDS[kind], type_name)
        return {"type": type_name, **checked(key, cls, resolved)}

    def build(self, key: str) -> Any:
        """The object of a component (``gate``), of one entry (``targets.concept``), or of a settings section.

        Raises:
            UserError: the recipe leaves this part out.
        """
        if key in SECTIONS:
            return _call(key, SETTINGS.find(key), self.config[key])
        head, _, tail = key.partition(".")
        spec = self.config[head].get(tail) if tail else self.config.get(head)
        if spec is None:
            raise UserError(f"{key}: this recipe ({self.config['title']}) has none, and it is needed here")
        kind = KINDS[MAPPINGS[head] if tail else COMPONENTS[head]]
        args = {name: value for name, value in spec.items() if name != "type"}
        return _call(key, _find(key, kind, spec["type"]), args)

    def arguments(self, key: str) -> dict[str, Any]:
        """The checked arguments of a component, defaults included."""
        return {name: value for name, value in (self.config[key] or {}).items() if name != "type"}

    def has(self, key: str) -> bool:
        return self.config.get(key) is not None

    def text(self) -> str:
        """The resolved recipe as JSON text, stable across runs."""
        return json.dumps(self.config, indent=2, sort_keys=True, ensure_ascii=False)

    def digest(self) -> str:
        """SHA-256 of the resolved recipe."""
        return hashlib.sha256(self.text().encode()).hexdigest()


def build_part(key: str, kind: str, spec: object) -> Any:
    """The object of one component on its own, from its name in ``registry/``, or dict(name= or type=..., arguments).

    Raises:
        UserError: no such part, or arguments that it does not take.
    """
    resolved = resolve(key, kind, spec)
    cls = _find(key, KINDS[kind], resolved.pop("type"))
    return _call(key, cls, checked(key, cls, resolved))


def _find(key: str, kind: Kind, name: str) -> type:
    try:
        return kind.find(name)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _call(key: str, cls: Any, args: Mapping[str, Any]) -> Any:
    """An object of a class; what it refuses is said with the recipe's key."""
    try:
        return cls(**copy.deepcopy(dict(args)))
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(key) else f"{key}: {text}") from error


def parse_overrides(argv: Sequence[str]) -> dict[str, Any]:
    """``['--gate', 'hard', '--latents.count=6']`` -> ``{'gate': 'hard', 'latents.count': 6}``; values are YAML.

    Raises:
        UserError: a word that is no flag, or a flag without a value.
    """
    overrides: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"'{word}' is no override; write --key value, for example --gate.warmup 200")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words or (words[0].startswith("--") and not words[0][2:3].isdigit()):
                raise UserError(f"--{key} needs a value")
            value = words.pop(0)
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            overrides[key] = value
    return overrides


def apply_overrides(config: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Set dotted keys; ``gate`` itself replaces the component by name, ``gate.warmup`` changes one argument."""
    config = copy.deepcopy(config)
    # Whole parts first, so that `--gate.warmup 9 --gate hard` means the same as the other order.
    for key in sorted(overrides, key=lambda k: k.count(".")):
        *parents, last = key.split(".")
        node = config
        for name in parents:
            child = node.get(name)
            if isinstance(child, str):
                child = {"name": child}
            if child is None:
                child = {}
            if not isinstance(child, dict):
                raise UserError(f"--{key}: '{name}' holds {child!r}, which has no parts")
            node[name] = child
            node = child
        node[last] = overrides[key]
    return config


def load_recipe(path: str | Path, argv: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read ``cfg.py`` (or a resolved ``recipe.json``), apply overrides, resolve and check it.

    Args:
        argv: overrides, as ``--key value`` words or by dotted key.

    Raises:
        UserError: the file is missing or does not read as a recipe, or any part of it is wrong.
    """
    path = Path(zoo_path(str(path)))
    if not path.is_file():
        raise UserError(f"no recipe at '{path}'; give a cfg.py, for example one of model_zoo/")
    try:
        raw = Config.fromfile(path, import_custom_modules=False).to_dict()
    except MISTAKES as error:
        raise UserError(f"{path} does not read as a recipe: {' '.join(str(error).split())}") from None
    raw = _plain(raw)
    if raw.get(IMPORTS) is not None:
        raw[IMPORTS] = import_custom(raw[IMPORTS], path.resolve().parent)
    return Recipe(apply_overrides(raw, argv if isinstance(argv, Mapping) else parse_overrides(argv)), path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
