"""``laavit traces import OFFICIAL.json OUT``: LaViT-15k as its authors store it, as a trace store.

It is an extraction whose teacher is the published files, so that it is cut into shards, resumed, split between jobs and
quarantined like any other.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laavit.commands.common import Parser
from laavit.commands.extract import extract_recipe
from laavit.recipe import Recipe, apply_overrides, parse_overrides
from laavit.registry import UserError
from laavit.teachers.official import RECORDED
from laavit.traces.semantics import SEMANTICS
from laavit.traces.store import TraceStore


def import_recipe(options: argparse.Namespace, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that an import is: data, features and settings; ``overrides`` are flags of its keys."""
    root: Path = options.root
    published = root / "data" / "images"  # as the authors lay their data set out
    images = options.images or (published if published.is_dir() else root)
    config: dict[str, Any] = {
        "title": "import of LaViT-15k",
        "data": {"name": "lavit_15k", "annotations": str(options.official), "root": str(images)},
        "teacher": {"name": "lavit_15k", "root": str(options.feature_root or root)},
        "extract": {**RECORDED, "semantics": options.semantics, "steps": "sentence"},
        "traces": {"path": str(options.out)},
    }
    if options.limit is not None:
        config["data"]["limit"] = options.limit
    return Recipe(apply_overrides(config, parse_overrides(overrides)))


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = Parser(
        prog="laavit traces import",
        description="LaViT-15k as its authors store it, imported, not recomputed.",
        epilog="Keys of the recipe are flags too: --teacher.max_pixels 12845056, --extract.semantics_dtype float16.",
    )
    parser.add_argument("official", type=Path, help='the training file, {"results": [...]}')
    parser.add_argument("out", type=Path, help="the store's folder; a stopped import goes on there")
    parser.add_argument("--root", type=Path, required=True, help="the data set's folder; nothing outside is opened")
    parser.add_argument("--images", type=Path, help="the image folder; default ROOT/data/images, or ROOT")
    parser.add_argument("--feature-root", type=Path, help="the folder of features and trajectories; default ROOT")
    parser.add_argument("--semantics", choices=SEMANTICS, default="gaze_top_k", help="what is kept of [N, 5120] states")
    parser.add_argument("--limit", type=int, help="at most this many samples")
    parser.add_argument("--part", metavar="I/N", help="do this part of the work alone (array jobs): 1/3, 2/3, 3/3")
    parser.add_argument("--retry", action="store_true", help="try the samples that were put aside again")
    options, overrides = parser.parse_known_args(list(argv))
    recipe = import_recipe(options, overrides)
    extract_recipe(recipe, argparse.Namespace(part=options.part, retry=options.retry))
    store = TraceStore(options.out, verify=False, complete=False)
    if not len(store) and not store.missing:
        raise UserError(
            f"no sample of '{options.official}' could be imported: {next(iter(store.quarantined.values()))}"
        )
    return 0
