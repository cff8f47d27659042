"""``laavit data``: ``check`` says what a data set holds, beside the paper's figures; ``fetch`` gets the benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from laavit.commands.common import Parser
from laavit.data.records import RecordReader
from laavit.data.statistics import LOOKS, Tokens, beside_paper, describe
from laavit.files import write_json
from laavit.recipe import Recipe, apply_overrides, load_recipe, parse_overrides
from laavit.registry import UserError, nearest

ACTIONS = ("check", "fetch")
_WORDS = {
    "question_words": "words a question",
    "question_words_max": "words, longest question",
    "answer_words": "words an answer",
    "answer_words_max": "words, longest answer",
    "image_width": "image width (px)",
    "image_height": "image height (px)",
    "visual_tokens": "visual tokens an image",
}


def open_data(recipe: str | None, overrides: Sequence[str]) -> RecordReader:
    """The reader of a recipe, or of ``--data NAME --data.annotations FILE --data.root FOLDER``.

    Raises:
        UserError: neither is given, or the recipe's data are of no reader.
    """
    if recipe is not None:
        loaded = load_recipe(recipe, overrides)
    elif overrides:
        loaded = Recipe(apply_overrides({"title": "data"}, parse_overrides(overrides)))
    else:
        raise UserError("laavit data check needs a recipe, or --data NAME --data.annotations FILE --data.root FOLDER")
    reader = loaded.build("data")
    if not isinstance(reader, RecordReader):
        raise UserError(f"data: {type(reader).__name__} is no reader of laavit.data; there is nothing to check")
    return reader


def check(argv: Sequence[str]) -> int:
    """``check [RECIPE]``: exit code 0 with a report, whatever it finds."""
    parser = Parser(
        prog="laavit data check",
        usage="laavit data check [RECIPE] [options]",
        allow_abbrev=False,
        description="Counts by source, broken images, odd boxes, duplicates, records in quarantine, and the paper's "
        "Tables A3 and A4 beside the same figures of this set.",
        epilog="RECIPE is a cfg.py (zoo:NAME.py is one of the model zoo) and comes first; its keys are flags. "
        "Without one: --data visual_cot --data.annotations FILE --data.root FOLDER.",
    )
    parser.add_argument("--images", choices=LOOKS, default="header", help="how closely image files are looked at")
    parser.add_argument("--workers", type=int, default=0, help="processes that look at images; 0 is this one")
    parser.add_argument("--json", type=Path, help="write the report as JSON")
    parser.add_argument("--patch", type=int, default=Tokens.patch, help="pixels a side of a patch")
    parser.add_argument("--merge", type=int, default=Tokens.merge, help="patches a side of a visual token")
    parser.add_argument("--min-pixels", type=int, default=Tokens.min_pixels, help="images are scaled up to these")
    parser.add_argument("--max-pixels", type=int, default=Tokens.max_pixels, help="images are scaled down to these")
    # the recipe is taken off first: argparse would take the value of a recipe's key for it
    words = list(argv)
    recipe = words.pop(0) if words and not words[0].startswith("-") else None
    options, overrides = parser.parse_known_args(words)
    if options.workers < 0:
        raise UserError(f"--workers: got {options.workers}; allowed: 0 or more")
    tokens = Tokens(options.patch, options.merge, options.min_pixels, options.max_pixels)
    if min(tokens.patch, tokens.merge, tokens.min_pixels) < 1 or tokens.max_pixels < tokens.min_pixels:
        raise UserError("--patch, --merge and --min-pixels are at least 1, and --max-pixels at least --min-pixels")
    report = describe(open_data(recipe, overrides), options.images, options.workers, tokens)
    show(report)
    if options.json is not None:
        write_json(options.json, report)
    return 0


def fetch(argv: Sequence[str]) -> int:
    """``fetch [BENCHMARK ...] --root DIR``: print the commands that download, or download with ``--run``."""
    parser = Parser(
        prog="laavit data fetch",
        description="Print the commands that download benchmarks from the hub, or run them (--run). The copies are "
        "what `laavit eval --data-root DIR` reads.",
        epilog="BENCHMARK is a name of eval/benchmarks.yaml; without one, all of them.",
        allow_abbrev=False,
    )
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help="for example mmvp, blink, cv_bench")
    parser.add_argument("--root", "--data-root", type=Path, required=True, help="the folder for the copies")
    parser.add_argument("--run", action="store_true", help="download now; needs the network")
    options = parser.parse_args(list(argv))
    from laavit.evaluation.fetch import downloads

    for download in downloads(options.benchmarks, options.root):
        sys.stdout.write(f"# {', '.join(download.titles)}; {download.licence or 'licence: see the card'}\n")
        sys.stdout.write(f"{download.command}\n")
        if options.run:
            sys.stdout.flush()
            download.run()
    return 0


def show(report: dict[str, Any]) -> None:
    """Print a report as tables."""
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=160)  # in a pipe no column is cut
    console.print(f"{report['records']} records, {report['samples']} samples\n", highlight=False)
    for table in (_sources(report), _statistics(report), _oddities(report)):
        console.print(table, highlight=False)
        console.print()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    return table


def _sources(report: dict[str, Any]) -> Table:
    table = _table("by source (Table A3)", "source", "samples", "share", "paper", "share")
    for name, count, share, published, paper_share in beside_paper(report):
        paper = ("–", "–") if published is None or paper_share is None else (f"{published}", f"{paper_share:.2%}")
        table.add_row(escape(name) or "(none)", f"{count}", f"{share:.2%}", *paper)
    table.add_row("all", f"{report['samples']}", "", f"{report['paper']['total']}", "")
    return table


def _statistics(report: dict[str, Any]) -> Table:
    table = _table("over samples (Table A4)", "mean", "here", "paper")
    for name, words in _WORDS.items():
        ours, theirs = report["statistics"].get(name), report["paper"]["statistics"].get(name)
        if ours is not None or theirs is not None:
            table.add_row(words, *("–" if value is None else f"{value:.2f}" for value in (ours, theirs)))
    return table


def _oddities(report: dict[str, Any]) -> Table:
    table = Table(title="boxes, images, quarantine", box=None, pad_edge=False, title_justify="left")
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_column("the first", overflow="fold")
    for name, count in report["boxes"].items():
        table.add_row(f"boxes: {name.replace('_', ' ')}", f"{count}", "")
    images = report["images"]
    table.add_row("images: files", f"{images['files']}", "")
    if "broken" in images:
        table.add_row("images: broken", f"{images['broken']}", _lines(images["reasons"]))
        table.add_row("images: samples they affect", f"{images['samples_affected']}", "")
    for kind, found in report["quarantined"].items():
        table.add_row(f"quarantine: {kind}", f"{found['records']}", _lines(found["first"]))
    return table


def _lines(reasons: Sequence[str]) -> str:
    return escape("\n".join(reasons))


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(
            "usage: laavit data check [RECIPE] ...\n"
            "       laavit data fetch [BENCHMARK ...] --root DIR [--run]   (--help lists options)\n"
        )
        return 0
    if argv[0] not in ACTIONS:
        raise UserError(f"laavit data: nothing is called '{argv[0]}'; {nearest(argv[0], ACTIONS)}")
    return check(argv[1:]) if argv[0] == "check" else fetch(argv[1:])
