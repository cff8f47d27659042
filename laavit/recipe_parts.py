"""The parts of a recipe that are cheap to build, and what configurations and stores tell of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from laavit.backbones.chat import PromptSettings
from laavit.backbones.configs import known_config
from laavit.gates import Gate
from laavit.latents import NO_LATENTS, LatentLayout
from laavit.recipe import COMPONENTS, Recipe
from laavit.registry import KINDS
from laavit.targets.base import Target
from laavit.traces.shards import read_header


@dataclass(frozen=True)
class Parts:
    """The cheap parts of a recipe, built, and what is known of the others.

    Args:
        gate: told the length of the run; None where there is none.
        layout: of the latents. targets: by name.
        prompt, traces, extract, train: the recipe's settings.
    """

    recipe: Recipe
    layout: LatentLayout
    gate: Gate | None
    targets: Mapping[str, Target]
    prompt: PromptSettings
    traces: Any
    extract: Any
    train: Any

    @classmethod
    def of(cls, recipe: Recipe) -> Parts:
        """Raises: UserError: a part refuses its arguments."""
        settings = {name: recipe.build(name) for name in ("prompt", "traces", "extract", "train")}
        gate = recipe.build("gate") if recipe.has("gate") else None
        if gate is not None:
            gate.set_run(settings["train"].steps)
        return cls(
            recipe=recipe,
            layout=recipe.build("latents").layout if recipe.has("latents") else NO_LATENTS,
            gate=gate,
            targets={name: recipe.build(f"targets.{name}") for name in recipe.config["targets"]},
            **settings,
        )

    def kind(self, key: str) -> Any:
        """The class of a component; None where the recipe leaves it out."""
        return KINDS[COMPONENTS[key]].find(self.recipe.config[key]["type"]) if self.recipe.has(key) else None

    def config(self, key: str) -> PreTrainedConfig | None:
        """The configuration of the student's or the teacher's model, as far as it is at hand."""
        path = self.recipe.arguments(key).get("path")
        return known_config(path) if path is not None and not getattr(self.kind(key), "static", False) else None

    @cached_property
    def student(self) -> PreTrainedConfig | None:
        return self.config("student")

    @cached_property
    def teacher(self) -> PreTrainedConfig | None:
        return self.config("teacher")

    def header(self, store: str | None) -> dict[str, Any] | None:
        """What the header of a trace store says, or will say once the recipe's teacher has written it.

        None where it is not known: there is neither a store yet nor a teacher, or the store is one of another recipe.

        Args:
            store: a target's own; None is the run's.
        """
        path = store or self.traces.path
        found = read_header(Path(path)) if path is not None and not path.startswith("hf://") else None
        if found is not None:
            return found.content
        if store is not None or not self.recipe.has("teacher"):
            return None
        text = self.teacher.get_text_config() if self.teacher is not None else None
        kind = {"static": "cls"} if getattr(self.kind("teacher"), "static", False) else {}
        return {
            "teacher": self.recipe.arguments("teacher").get("path"),
            "width": text.hidden_size if text is not None else self.recipe.arguments("teacher").get("width", 1),
            "gaze_top_k": self.extract.gaze_top_k,
            "settings": self.extract.card(),
            **kind,
        }
