"""A recipe's filters over a store that is there: after an extraction, or again, without the teacher."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from laavit.recipe import Recipe
from laavit.registry import UserError
from laavit.structures import Sample
from laavit.traces.judging import judge_all
from laavit.traces.store import TraceStore

logger = logging.getLogger(__name__)


def recipe_filters(recipe: Recipe) -> dict[str, Any]:
    """The recipe's filters, built; a mistake in one is said before anything is read."""
    return {name: recipe.build(f"filters.{name}") for name in recipe.config["filters"]}


def judge_store(recipe: Recipe, store: TraceStore, samples: Iterable[Sample]) -> None:
    """Write a column a filter of the recipe over all traces of the store."""
    filters = recipe_filters(recipe)
    for name, passed in judge_all(store, samples, filters, recipe.config["filters"]).items():
        share = 100 * passed / max(len(store), 1)
        logger.info("filter %s: %d of %d pass (%.1f %%)", name, passed, len(store), share)


def judge_recipe(recipe: Recipe) -> TraceStore:
    """Judge the store at ``traces.path`` by the recipe's filters.

    Raises:
        UserError: the recipe has no filters or no store, or a filter cannot judge this store.
    """
    settings = recipe.build("traces")
    if settings.path is None:
        raise UserError("traces.path: the recipe does not say where the traces are")
    if not recipe.config["filters"]:
        raise UserError("filters: this recipe has none; for example filters=dict(correctness='correctness')")
    if settings.path.startswith("hf://"):
        raise UserError(f"'{settings.path}' is read only; export it to a folder first (laavit traces export)")
    store = TraceStore(settings.path)
    judge_store(recipe, store, recipe.build("data"))
    return store
