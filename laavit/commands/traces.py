"""``laavit traces ACTION ...``: read, check, plot, filter, subset, join and share trace stores, without a teacher."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from laavit.commands import trace_views as views
from laavit.commands.common import Parser, parse_recipe, recipe_parser
from laavit.recipe import Recipe, load_recipe
from laavit.registry import UserError, nearest
from laavit.traces.hub import files_of, local_store, push
from laavit.traces.store import TraceStore

logger = logging.getLogger(__name__)

STORE = "a store's folder, or hf://datasets/NAME/REPOSITORY"


def _parser(action: str, description: str, store: bool = True, recipe: bool = False) -> Parser:
    parser = Parser(prog=f"laavit traces {action}", description=description)
    if store:
        parser.add_argument("store", help=STORE)
    if recipe:
        parser.add_argument(
            "--recipe", help="a cfg.py that says which data the traces are of; its keys are flags (--data.root ...)"
        )
    return parser


def _parse(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, Recipe | None]:
    """The options, and the recipe of --recipe with the flags that are its keys."""
    options, overrides = parser.parse_known_args(list(argv))
    if options.recipe is None:
        if overrides:
            raise UserError(f"{parser.prog}: '{overrides[0]}' is no option of it (--help lists what is allowed)")
        return options, None
    return options, load_recipe(options.recipe, overrides)


def _open(path: str, complete: bool = True) -> TraceStore:
    return TraceStore(local_store(path), complete=complete)


def _sources(recipe: Recipe | None) -> dict[str, str] | None:
    """Sample id -> source set; the readers know it without touching an image."""
    if recipe is None:
        return None
    data = recipe.build("data")
    if hasattr(data, "sources_by_id"):
        return dict(data.sources_by_id())
    return {sample.id: sample.source for sample in data}


def verify(argv: Sequence[str]) -> int:
    """``verify STORE``: exit code 0 where all is well, 1 with a line for each damage."""
    from laavit.traces.checking import problems

    store = local_store(_parser("verify", "Check files, hashes, ids and figures.").parse_args(list(argv)).store)
    found = problems(store)
    for name, what in found.items():
        sys.stdout.write(f"{name}: {what}\n")
    if found:
        sys.stdout.write(f"{store}: {len(found)} damages; extract again to fill up shards, judge again for verdicts\n")
        return 1
    opened = TraceStore(store, verify=False)
    aside = f", {len(opened.quarantined)} samples put aside" if opened.quarantined else ""
    sys.stdout.write(f"{store}: {len(opened)} traces{aside}, all well\n")
    return 0


def stats(argv: Sequence[str]) -> int:
    """``stats STORE [--recipe CFG]``: header, figures, the filters' funnel, the table by source."""
    from laavit.traces.funnel import by_source, funnel
    from laavit.traces.summary import summarise

    parser = _parser(
        "stats", "Figures of a store, its filters' funnel, and its sources beside the paper's.", recipe=True
    )
    parser.add_argument("--boxes", action="store_true", help="measure the mass in the boxes of --recipe's data as well")
    parser.add_argument("--filters", nargs="+", help="the funnel's filters in order; default the paper's order")
    parser.add_argument("--header", action="store_true", help="print the whole header")
    parser.add_argument("--fast", action="store_true", help="leave out the figures that read every trace")
    options, recipe = _parse(parser, argv)
    if options.boxes and recipe is None:
        raise UserError("--boxes needs --recipe, which says what data the traces are of")
    store = _open(options.store, complete=False)
    views.print_store(store, options.header)
    if not options.fast:
        boxes = None
        if options.boxes and recipe is not None:
            from laavit.traces.judging import with_traces

            boxes = {sample.id: sample.boxes for sample in with_traces(recipe.build("data"), store)}
        views.print_summary(summarise(store, boxes), store.header.get("gaze_top_k"))
    found = funnel(store, options.filters)
    views.print_funnel(found)
    sources = _sources(recipe)
    if sources is not None:
        views.print_sources(by_source(found, store, sources))
    return 0


def show(argv: Sequence[str]) -> int:
    """``show STORE ID... [--recipe CFG] [--out DIR]``: traces as text, and as pictures where their images are known."""
    parser = _parser("show", "Single traces as text, and with --recipe as PNG pictures.", recipe=True)
    parser.add_argument("ids", nargs="*", help="sample ids; default the first")
    parser.add_argument("--out", type=Path, default=Path("traces_shown"), help="folder of the pictures")
    options, recipe = _parse(parser, argv)
    store = _open(options.store)
    if not len(store):
        raise UserError(f"the trace store '{store.path}' holds no trace")
    samples = recipe.build("data") if recipe is not None else None
    for key in options.ids or store.ids[:1]:
        trace = store.get(key)
        sample = samples.get(key) if samples is not None else None
        views.print_trace(store, trace, sample)
        if sample is not None:
            from laavit.reports.trace_picture import draw_trace

            name = "".join(c if c.isalnum() or c in "-_." else "_" for c in key)
            sys.stdout.write(f"{draw_trace(sample, trace, options.out / f'{name}.png')}\n")
    return 0


def export(argv: Sequence[str]) -> int:
    """``export STORE OUT``: some of the traces as a store of their own, as Parquet, or as JSON lines."""
    from laavit.traces.export import DTYPES, FORMATS, export_store

    parser = _parser("export", "A part of a store as a new store, or as one file for other tools.", recipe=True)
    parser.add_argument("out", type=Path, help="a new folder, or with --format a file")
    parser.add_argument("--select", nargs="+", default=[], help="filters that a trace has to pass")
    parser.add_argument("--ids", type=Path, help="a file of sample ids, one a line")
    parser.add_argument("--sources", nargs="+", help="source sets (needs --recipe)")
    parser.add_argument("--limit", type=int, help="at most this many, in the store's order")
    parser.add_argument("--format", choices=["store", *FORMATS], default="store")
    parser.add_argument("--top-k", type=int, help="keep the k strongest tokens of every map")
    parser.add_argument("--semantics-dtype", choices=DTYPES)
    options, recipe = _parse(parser, argv)
    store = _open(options.store)
    ids = _chosen(store, options, recipe)
    if options.format == "store":
        how = {"select": options.select, "sources": options.sources, "limit": options.limit}
        used = {key: value for key, value in how.items() if value}
        new = export_store(store, options.out, ids, options.top_k, options.semantics_dtype, used)
        size = new.bytes_per_sample()
        logger.info("%d of %d traces, %.0f bytes each -> %s", len(new), len(store), size, options.out)
        return 0
    if options.top_k is not None or options.semantics_dtype is not None:
        raise UserError("--top-k and --semantics-dtype are of a store; export one first, then its --format")
    if options.out.is_dir():
        raise UserError(f"'{options.out}' is a folder; --format {options.format} writes one file")
    if not ids:
        raise UserError(f"no trace of '{store.path}' is left to export: {len(store)} traces, none selected")
    FORMATS[options.format](store, options.out, ids)
    logger.info("%d of %d traces -> %s", len(ids), len(store), options.out)
    return 0


def _chosen(store: TraceStore, options: argparse.Namespace, recipe: Recipe | None) -> list[str]:
    """The ids that the options leave, in the store's order."""
    ids = list(store.select(options.select))
    if options.ids is not None:
        try:
            named = set(options.ids.read_text(encoding="utf-8").split("\n")) - {""}
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--ids: '{options.ids}' cannot be read as a list of ids: {error}") from error
        for key in sorted(named - set(store.ids))[:1]:
            store.get(key)
        ids = [key for key in ids if key in named]
    if options.sources is not None:
        sources = _sources(recipe)
        if sources is None:
            raise UserError("--sources needs --recipe, which says what data the traces are of")
        known = {sources[key] for key in store.ids if key in sources}
        for source in options.sources:
            if source not in known:
                raise UserError(f"--sources: no trace is of the source '{source}'; {nearest(source, known)}")
        ids = [key for key in ids if sources.get(key) in options.sources]
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit is at least 1, got {options.limit}")
    return ids[: options.limit]


def merge(argv: Sequence[str]) -> int:
    """``merge OUT STORE STORE...``: parts of an extraction, or stores of equal settings, as one."""
    from laavit.traces.merge import merge as merge_stores

    parser = _parser("merge", "Several stores into one; equal duplicates are dropped.", store=False)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("stores", type=Path, nargs="+", help="the parts' folders")
    parser.add_argument("--partial", action="store_true", help="shards may be missing; the extraction can go on in OUT")
    options = parser.parse_args(list(argv))
    done = merge_stores(options.out, options.stores, options.partial)
    missing = f", {len(done.missing)} shards are missing" if done.missing else ""
    logger.info("%d traces -> %s (%d duplicates dropped%s)", done.traces, options.out, done.dropped, missing)
    return 0


def diff(argv: Sequence[str]) -> int:
    """``diff A B``: exit code 0 where both say the same of the same samples, 1 where anything differs."""
    from laavit.traces.diff import compare

    parser = _parser("diff", "What differs between two stores; exit code 1 where anything does.", store=False)
    parser.add_argument("first", help=STORE)
    parser.add_argument("second", help=STORE)
    parser.add_argument("--show", type=int, default=5, help="samples named a difference")
    options = parser.parse_args(list(argv))
    found = compare(_open(options.first), _open(options.second))
    views.print_difference(found, (Path(options.first), Path(options.second)), options.show)
    return 0 if found.equal else 1


def judge(argv: Sequence[str]) -> int:
    """``judge RECIPE``: the recipe's filters over its store, again; the teacher is not needed."""
    from laavit.commands.judging import judge_recipe
    from laavit.traces.funnel import funnel

    parser = recipe_parser(
        "laavit traces judge", "Write the verdicts of a recipe's filters over a store that is there."
    )
    _, recipe = parse_recipe(parser, argv)
    if recipe is not None:
        views.print_funnel(funnel(judge_recipe(recipe)))
    return 0


def card(argv: Sequence[str]) -> int:
    """``card STORE``: write README.md, the dataset card."""
    from laavit.traces.card import write_card

    parser = _parser("card", "Write a store's dataset card, README.md; its license line is yours to fill in.")
    parser.add_argument("--name", help="the card's title; default the folder's name")
    options = parser.parse_args(list(argv))
    logger.info("written: %s", write_card(_open(options.store), options.name))
    return 0


def push_store(argv: Sequence[str]) -> int:
    """``push STORE REPOSITORY``: upload a verified store with its card to the Hugging Face hub."""
    parser = _parser("push", "Upload a store and its card to a dataset repository of the Hugging Face hub.")
    parser.add_argument("repository", help="NAME/REPOSITORY")
    parser.add_argument("--public", action="store_true", help="make a new repository public; default private")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, and stop")
    options = parser.parse_args(list(argv))
    store = _open(options.store)
    files = files_of(store)
    size = sum((store.path / file).stat().st_size for file in files)
    if options.dry_run:
        for file in files:
            sys.stdout.write(f"{(store.path / file).stat().st_size:>12} {file}\n")
        sys.stdout.write(f"{size:>12} bytes in {len(files)} files for {options.repository}; nothing was uploaded\n")
        return 0
    address = push(store, options.repository, private=not options.public)
    logger.info("%d files, %.1f MB -> %s", len(files), size / 1e6, address)
    return 0


def import_official(argv: Sequence[str]) -> int:
    """``import OFFICIAL.json OUT``: LaViT-15k as its authors store it."""
    from laavit.commands.import_traces import main as import_main

    return import_main(argv)


def calibrate(argv: Sequence[str]) -> int:
    """``calibrate RECIPE``: which rows, layers and heads of a teacher look into the boxes."""
    from laavit.commands.calibrate import calibrate_main

    return int(calibrate_main(list(argv)) or 0)


Action = Callable[[Sequence[str]], int]

#: action -> (what runs it, one line)
ACTIONS: dict[str, tuple[Action, str]] = {
    "verify": (verify, "check a store's files, hashes, ids and figures"),
    "stats": (stats, "figures, the filters' funnel, sources beside the paper's"),
    "show": (show, "single traces as text and pictures"),
    "judge": (judge, "run a recipe's filters again, without the teacher"),
    "export": (export, "a part of a store; Parquet and JSON lines"),
    "merge": (merge, "several stores into one"),
    "diff": (diff, "what differs between two stores"),
    "card": (card, "write the dataset card"),
    "push": (push_store, "upload a store to the Hugging Face hub"),
    "import": (import_official, "import LaViT-15k as its authors store it"),
    "calibrate": (calibrate, "which rows, layers and heads look into the boxes"),
}


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    words: list[Any] = list(argv)
    if not words or words[0] in ("-h", "--help"):
        usage = "\n".join(f"  {name:10} {line}" for name, (_, line) in ACTIONS.items())
        sys.stdout.write(f"usage: laavit traces ACTION ...   (each has --help)\n\n{usage}\n")
        return 0
    if words[0] not in ACTIONS:
        raise UserError(f"laavit traces: no action is called '{words[0]}'; {nearest(words[0], ACTIONS)}")
    return ACTIONS[words[0]][0](words[1:])
