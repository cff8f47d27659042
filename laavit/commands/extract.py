"""``tools/extract.py cfg.py``: write a teacher's traces, and the verdicts of the recipe's filters beside them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from laavit.commands.common import checked_data, data_card, parse_recipe, recipe_parser
from laavit.recipe import Recipe
from laavit.registry import UserError
from laavit.traces.store import TraceStore

logger = logging.getLogger(__name__)


def extract_recipe(recipe: Recipe) -> Path:
    """Extract what is missing, then judge every trace by every filter; returns the store's folder."""
    from laavit.teachers import extract

    settings = recipe.build("traces")
    if settings.path is None:
        raise UserError("traces.path: the recipe does not say where the traces go")
    samples = checked_data(recipe)
    filters = {name: recipe.build(f"filters.{name}") for name in recipe.config["filters"]}
    teacher = recipe.build("teacher")
    out = extract(teacher, samples, recipe.build("extract"), Path(settings.path), data_card(recipe))
    store = TraceStore(out)
    for name, judge in filters.items():
        results = {sample.id: judge(sample, store.get(sample.id)) for sample in samples}
        store.write_verdicts(name, {k: v for k, (v, _) in results.items()}, {k: s for k, (_, s) in results.items()})
        passed = sum(verdict for verdict, _ in results.values())
        share = 100 * passed / max(len(results), 1)
        logger.info("filter %s: %d of %d pass (%.1f %%)", name, passed, len(results), share)
    logger.info("%d traces, %.0f bytes each -> %s", len(store), store.bytes_per_sample(), out)
    return out


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = recipe_parser("extract", "Write a teacher's traces; a stopped extraction goes on where it was.")
    _, recipe = parse_recipe(parser, argv)
    if recipe is not None:
        extract_recipe(recipe)
    return 0
