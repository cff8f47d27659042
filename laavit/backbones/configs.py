"""Configurations of models without their weights: those kept in ``model_zoo/configs``, and what is on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from laavit.paths import project_data
from laavit.recipe import zoo_path


def published_names() -> dict[str, Path]:
    """Hub names whose published configuration is kept in ``model_zoo/configs``."""
    files = sorted((project_data("model_zoo") / "configs").glob("*.json"))
    return {file.stem.replace("--", "/"): file for file in files}


def published(path: str) -> tuple[PreTrainedConfig, dict[str, Any]] | None:
    """A kept configuration, and what is kept beside it (source, tokens, max_pixels); None where none is."""
    file = published_names().get(path)
    if file is None:
        return None
    data = json.loads(file.read_text(encoding="utf-8"))
    return CONFIG_MAPPING[data["config"]["model_type"]].from_dict(data["config"]), data


def known_config(path: str) -> PreTrainedConfig | None:
    """The configuration of a folder, a hub name or ``zoo:NAME`` as far as it is at hand; nothing is fetched.

    None where it is neither kept, nor a folder's, nor in the hub's cache, or does not read: who loads the model says
    what is wrong with it.
    """
    if (kept := published(path)) is not None:
        return kept[0]
    try:
        return AutoConfig.from_pretrained(zoo_path(path), local_files_only=True)
    except (OSError, ValueError):
        return None
