"""``laavit extract cfg.py``: write a teacher's traces, and the verdicts of the recipe's filters beside them.

One process, the ranks of ``torchrun -m laavit.cli extract cfg.py``, an array of independent jobs (``--part 2/3``) or a
Ray cluster (``--engine ray``) fill the same store with the same bytes. Whoever finds the store complete judges.
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from laavit.commands.common import data_card, parse_recipe, recipe_parser
from laavit.recipe import Recipe
from laavit.registry import UserError
from laavit.traces.store import TraceStore

logger = logging.getLogger(__name__)

#: how many samples that were put aside are named at the end
NAMED = 10


def extract_recipe(recipe: Recipe, options: Namespace | None = None) -> Path:
    """Extract what is missing, then judge every trace by every filter; returns the store's folder.

    Args:
        options: the command's own flags; None: everything, here and now.
    """
    from laavit.teachers import extract
    from laavit.teachers.plan import Share
    from laavit.traces.judging import check

    given = {"part": None, "engine": "local", "actors": 0, "gpus": 0.0, "retry": False} | vars(options or Namespace())
    share = Share.of(given["part"])
    out = recipe.build("traces").path
    if out is None:
        raise UserError("traces.path: the recipe does not say where the traces go")
    if out.startswith("hf://"):
        raise UserError(f"traces.path: '{out}' can be read, not written; extract to a folder, then laavit traces push")
    settings, samples, card = recipe.build("extract"), recipe.build("data"), data_card(recipe)
    filters = {name: recipe.build(f"filters.{name}") for name in recipe.config["filters"]} if share.rank == 0 else {}
    check(filters, {"gaze_top_k": settings.gaze_top_k, "settings": settings.card()})  # before hours of work
    if given["engine"] == "ray":
        from laavit.teachers.ray_engine import Work, extract_on_ray

        if share.ranks > 1:
            raise UserError("--engine ray starts its own processes; run it without torchrun")
        work = Work(partial(_build, recipe), settings, Path(out).resolve(), card, Path.cwd())
        extract_on_ray(work, samples, share, given["retry"], given["actors"], given["gpus"])
    else:
        if torch.cuda.is_available() and share.ranks > 1:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        extract(recipe.build("teacher"), samples, settings, Path(out), card, share, given["retry"])
    if share.rank == 0:
        finish(Path(out), samples, filters, recipe.config["filters"])
    return Path(out)


def _build(recipe: Recipe) -> Any:
    return recipe.build("teacher"), recipe.build("data")


def finish(out: Path, samples: Any, filters: dict[str, Any], settings: dict[str, Any]) -> None:
    """Say what was put aside, and judge the traces if all of them are there."""
    from laavit.traces.judging import judge_all

    store = TraceStore(out, complete=False)
    if store.quarantined:
        logger.warning("%d of %d samples were put aside:", len(store.quarantined), store.planned)
        for key, reason in list(store.quarantined.items())[:NAMED]:
            logger.warning("  %s: %s", key, reason)
        if len(store.quarantined) > NAMED:
            logger.warning("  ... (TraceStore('%s').quarantined names all)", out)
    if store.missing:
        logger.info("%d shards are for other jobs to do; the last one judges by the filters", len(store.missing))
        return
    passed = judge_all(store, samples, filters, settings)
    for name, count in passed.items():
        share = 100 * count / max(len(store), 1)
        logger.info("filter %s: %d of %d pass (%.1f %%)", name, count, len(store), share)
    logger.info("%d traces, %.0f bytes each -> %s", len(store), store.bytes_per_sample(), out)


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = recipe_parser("extract", "Write a teacher's traces; a stopped extraction goes on where it was.")
    parser.add_argument("--part", metavar="I/N", help="do this part of the work alone (array jobs): 1/3, 2/3, 3/3")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: on a Ray cluster")
    parser.add_argument("--actors", type=int, default=0, help="teachers on the Ray cluster; default: one a GPU")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of one of them; default: 1 where there are any")
    parser.add_argument("--retry", action="store_true", help="try the samples that were put aside again")
    options, recipe = parse_recipe(parser, argv)
    if recipe is not None:
        extract_recipe(recipe, options)
    return 0
