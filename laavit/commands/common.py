"""What several commands share: the parser of a recipe command, data with hashes, and where a run keeps what."""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from laavit.recipe import COMPONENTS, MAPPINGS, SECTIONS, Recipe, load_recipe
from laavit.registry import KINDS, SETTINGS, UserError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are the project's: one line, exit code 2; usage lines begin with ``laavit``."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (--help lists what is allowed)")

    def format_usage(self) -> str:
        return self._as_typed(super().format_usage())

    def format_help(self) -> str:
        return self._as_typed(super().format_help())

    def _as_typed(self, text: str) -> str:
        return (
            text
            if self.prog.startswith("laavit")
            else text.replace(f"usage: {self.prog}", f"usage: laavit {self.prog}", 1)
        )


def recipe_parser(prog: str, description: str) -> Parser:
    """The parser of a command that takes a recipe; unknown flags are the recipe's overrides."""
    parser = Parser(
        prog=prog,
        description=description,
        add_help=False,
        epilog="Any key of the recipe is a flag: --gate hard --latents.count 6 --seed 3. "
        "--help with a recipe lists them all.",
    )
    parser.add_argument("recipe", nargs="?", help="a cfg.py; zoo:NAME.py is one of the model zoo")
    parser.add_argument("-h", "--help", action="store_true", help="show this help, and the recipe's keys")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    return parser


def parse_recipe(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, Recipe | None]:
    """The command's own flags and the recipe with its overrides; None where help or the configuration was printed.

    Raises:
        UserError: the recipe is not right, or its parts do not fit one another.
    """
    options, overrides = parser.parse_known_args(list(argv))
    if options.help and options.recipe is None:
        parser.print_help()
        return options, None
    if options.recipe is None:
        raise UserError(f"{parser.prog} needs a recipe, for example model_zoo/microlab/lavit.py")
    recipe = load_recipe(options.recipe, overrides)
    if options.help:
        parser.print_help()
        sys.stdout.write("\nkeys of this recipe:\n" + recipe_flags(recipe))
        return options, None
    from laavit.compatibility import check

    check(recipe)
    if options.print_config:
        sys.stdout.write(recipe.text() + "\n")
        return options, None
    return options, recipe


def recipe_flags(recipe: Recipe) -> str:
    """Every key of a recipe as a flag with its type, help and present value, from the classes' signatures."""
    parser = ArgumentParser(prog="recipe", usage=argparse.SUPPRESS, add_help=False)
    seed = recipe.config["seed"]
    parser.add_argument("--seed", type=int, default=seed, help="of initialisation, data order and sampling")
    parts = {key: (KINDS[kind], recipe.config[key]) for key, kind in COMPONENTS.items()}
    for key, kind in MAPPINGS.items():
        parts |= {f"{key}.{name}": (KINDS[kind], spec) for name, spec in recipe.config[key].items()}
    for key, (registry, spec) in parts.items():
        if spec is not None:
            parser.add_class_arguments(registry.find(spec["type"]), key)
            parser.set_defaults({f"{key}.{name}": value for name, value in spec.items() if name != "type"})
    for section in SECTIONS:
        parser.add_class_arguments(SETTINGS.find(section), section)
        parser.set_defaults({f"{section}.{name}": value for name, value in recipe.config[section].items()})
    # jsonargparse offers a file for every group; here a component is replaced by name, and a section has no name
    text = re.sub(rf"  --({'|'.join(SECTIONS)}) CONFIG\s+Path to a configuration file\.\n", "", parser.format_help())
    return re.sub(r"(  --\S+) CONFIG(\s+)Path to a configuration file\.", r"\1 NAME\2  another part by name", text)


def minutes(text: str) -> float:
    """A word of the command line as minutes.

    Raises:
        ArgumentTypeError: it is no number from 0.
    """
    try:
        given = float(text)
    except ValueError:
        given = math.nan
    if not 0 <= given < math.inf:
        raise argparse.ArgumentTypeError(f"got '{text}'; allowed: a number of minutes, 0 or more")
    return given


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def data_card(recipe: Recipe) -> dict[str, Any]:
    """What a run or a store says of its data: the component's settings and the annotations' hash."""
    spec = dict(recipe.config["data"] or {})
    path = spec.get("annotations")
    if path is not None and Path(path).is_file():
        spec["annotations_sha256"] = file_digest(Path(path))
    return spec


def checkpoint_of(run: Path) -> Path:
    """The newest complete checkpoint of a run folder.

    Raises:
        UserError: the folder is no run, or it has no checkpoint yet.
    """
    from laavit.engine import latest_checkpoint

    found = latest_checkpoint(run)
    if found is None:
        raise UserError(f"'{run}' holds no checkpoint; tools/train.py writes them to RUN/checkpoints")
    return found


def run_recipe(run: Path) -> Recipe:
    """The resolved recipe a run was made with."""
    file = run / "recipe.json"
    if not file.is_file():
        raise UserError(f"'{run}' is no run folder: recipe.json is missing")
    return load_recipe(file)
