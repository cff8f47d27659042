"""Recipes over tiny folders, and what the tests of plans ask of them."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from laavit.engine import plan as planning
from laavit.engine.planning.models import Shaped
from laavit.engine.planning.passes import Step, training_step
from laavit.recipe import Recipe

LOAD = planning.Load(text=24, answer=4)


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    component = {"name": "hf", "path": str(folder)}
    parts = {
        "student": component,
        "teacher": component,
        "latents": {"name": "learned", "count": 3},
        "gate": {"name": "cosine", "warmup": 4},
        "targets": {"concept": "concept", "trajectory": "trajectory"},
        "train": {"steps": 10, "batch_size": 4},
    }
    return Recipe({**parts, **changes})


def step_of(shaped: Shaped, size: int, checkpointing: bool = False, load: planning.Load = LOAD) -> Step:
    """A training step of so many samples; without their way through the tower, as cached features have it."""
    passes = planning.passes_of(shaped, size, load)
    return training_step(shaped, passes.items, passes.vision(False).features, load, checkpointing)


@lru_cache
def _planned(folder: Path, gpus: int) -> dict[str, Any]:
    return planning.make_plan(recipe_of(folder), replace(LOAD, gpus=gpus))


def plan_of(folder: Path, gpus: int = 1) -> dict[str, Any]:
    """The plan of ``recipe_of(folder)``, worked out once for all tests."""
    return copy.deepcopy(_planned(folder, gpus))


def memory_of(found: dict[str, Any], way: str = "single") -> dict[str, int]:
    return next(row["memory"] for row in found["ways"] if row["name"] == way)
