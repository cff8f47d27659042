"""``laavit list [kind]`` and ``laavit show NAME``: the named parts, their arguments and where they come from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import yaml
from rich.console import Console
from rich.table import Table

from laavit.commands.common import Parser
from laavit.recipe import Card, cards, checked
from laavit.registry import FAMILIES, KINDS, UserError, nearest

#: model families have no file in registry/: a model's own ``model_type`` names its family
OWN = "families"


def list_parts(kind: str | None) -> None:
    """Print all named parts, or those of one kind."""
    kinds = list(KINDS) if kind is None else [kind]
    table = Table(box=None, pad_edge=False)
    for title in ("kind", "name", "description", "source"):
        table.add_column(title, overflow="fold")
    for each in kinds:
        for row in _families() if each == OWN else cards(each).values():
            table.add_row(each, row.name, row.description, row.source)
    console = Console()
    # In a pipe one line a part, whatever the width.
    (console if console.is_terminal else Console(width=240)).print(table)


def _families() -> Iterator[Card]:
    FAMILIES.import_from_location()
    for name, cls in sorted(FAMILIES.module_dict.items()):
        described = inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]
        yield Card(OWN, name, cls.__name__, {}, described, cls.__module__)


def show_part(name: str) -> None:
    """Print every part of that name; ``kind/name`` picks one kind."""
    wanted_kind, _, short = name.rpartition("/")
    kinds = [kind for kind in KINDS if wanted_kind in ("", kind)]
    found = [card for kind in kinds for card in cards(kind).values() if card.name == short]
    if not found:
        every = [card.name for kind in KINDS for card in cards(kind).values()]
        raise UserError(f"no part is called '{name}'; {nearest(short, every)}")
    console = Console(soft_wrap=True)
    for card in found:
        cls = KINDS[card.kind].find(card.type)
        arguments = checked(card.name, cls, card.args) if _complete(cls, card.args) else dict(card.args)
        console.print(f"{card.kind}/{card.name}: {card.description}\nsource: {card.source}")
        console.print(f"class: {cls.__module__}.{card.type}")
        console.print(yaml.safe_dump({"arguments": _plain(arguments)}, sort_keys=False, allow_unicode=True), end="")
        # where the constructor is inherited, its arguments are described there
        described = dict.fromkeys((cls, next(base for base in cls.__mro__ if "__init__" in vars(base))))
        for each in described:
            console.print(inspect.cleandoc(each.__doc__ or "") + "\n", markup=False)


def _complete(cls: type, args: object) -> bool:
    required = [p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
    return all(name in args for name in required)  # type: ignore[operator]


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = Parser(prog="laavit list / show", description="Named parts.")
    kinds = ", ".join([*KINDS, OWN])
    parser.add_argument("name", nargs="?", help=f"a kind ({kinds}), or a part's name (kind/name where several have it)")
    name = parser.parse_args(list(argv)).name
    if name is None or name in (*KINDS, OWN):
        list_parts(name)
    else:
        show_part(name)
    return 0
