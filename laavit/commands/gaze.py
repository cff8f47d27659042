"""``tools/gaze.py OUT NAME=FOLDER ...``: where models look, on samples with boxes."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from laavit.commands.common import Parser
from laavit.commands.data import open_data
from laavit.registry import UserError
from laavit.structures import Sample

DATA = (
    "Data: --annotations FILE --root FOLDER (Visual-CoT), or any reader as a recipe names it: --data NAME "
    "--data.annotations FILE --data.root FOLDER ...; or --recipe cfg.py, whose data are taken."
)


def looker_parser(prog: str, description: str, shown: str = "gaze") -> Parser:
    """A parser of ``OUT NAME=FOLDER ...`` and data; the readers' own flags are taken off by ``parse_looking``.

    Args:
        shown: the folder of a run that its report shows.
    """
    parser = Parser(prog=prog, description=description, epilog=DATA, allow_abbrev=False)
    parser.add_argument("out", type=Path, help=f"folder to write; RUN/{shown} is shown by `laavit report RUN`")
    parser.add_argument(
        "lookers", nargs="+", help="NAME=FOLDER, or NAME=FOLDER@latents, or NAME=FOLDER@header+answer@-2,-1"
    )
    parser.add_argument("--annotations", type=Path, help="Visual-CoT JSON with boxes")
    parser.add_argument("--root", type=Path, help="its image folder")
    parser.add_argument("--recipe", help="a cfg.py (zoo:NAME.py) whose data are looked at")
    return parser


def parse_looking(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, Sequence[Sample]]:
    """The command's flags, and the samples of its data (unread until they are asked for).

    Raises:
        UserError: there are no data, two kinds of them, or they cannot be opened.
    """
    words, data = _apart(argv)
    options = parser.parse_args(words)
    pair = [options.annotations, options.root]
    if any(each is not None for each in pair):
        if None in pair or data or options.recipe:
            raise UserError(f"{parser.prog}: --annotations goes with --root, and with no --data or --recipe. {DATA}")
        data = ["--data", "visual_cot", f"--data.annotations={options.annotations}", f"--data.root={options.root}"]
    elif not data and not options.recipe:
        raise UserError(f"{parser.prog}: no data are given. {DATA}")
    return options, open_data(options.recipe, data)


def _apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and ``--data``, ``--data.KEY`` with their values."""
    own: list[str] = []
    data: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.partition("=")[0] == "--data" or word.startswith("--data."):
            data.append(word)
            if "=" not in word and words and not words[0].startswith("--"):
                data.append(words.pop(0))
        else:
            own.append(word)
    return own, data


def chosen(samples: Sequence[Sample], limit: int | None, seed: int | None = None) -> list[Sample]:
    """At most ``limit`` samples: the first ones, or with a seed drawn at random, in the order of the data."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit: at least 1, got {limit}")
    places = range(len(samples))
    if limit is None or limit >= len(samples):
        return [samples[place] for place in places]
    return [samples[p] for p in (places[:limit] if seed is None else sorted(random.Random(seed).sample(places, limit)))]


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = looker_parser(
        "gaze",
        "Attention maps and their statistics for any models, written where tools/report.py finds them (RUN/gaze).",
    )
    parser.add_argument("--limit", type=int, default=300, help="samples looked at, from the start")
    parser.add_argument("--show", type=int, default=6, help="samples drawn")
    parser.add_argument("--batch-size", type=int, default=32)
    options, samples = parse_looking(parser, argv)
    from laavit.evaluation.gaze import Looker, write_gaze

    lookers = [Looker.parse(text) for text in options.lookers]
    write_gaze(options.out, lookers, chosen(samples, options.limit), options.show, options.batch_size)
    return 0
