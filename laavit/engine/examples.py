"""Traces of a given shape with random contents, to work out what a recipe takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from laavit.backbones.rows import emits
from laavit.structures import AnswerLogits, Encoded, Step, Tile, Trace


def stored_rows(settings: Mapping[str, Any], tokens: int) -> int:
    """How many image tokens' states a trace holds; 0 where they are pooled into one vector.

    Args:
        settings: of the extraction, as a store's header has them.
    """
    return {"full": tokens, "top_k_rows": min(settings["top_k"], tokens)}.get(settings["semantics"], 0)


def example_trace(tiles: tuple[Tile, ...], width: int, settings: Mapping[str, Any], item: Encoded) -> Trace:
    """A trace over a teacher's tiles. width: of its semantics. settings: of the extraction. item: what it is about."""
    words, kept = item.labels[(item.labels >= 0) & ~emits(item.roles)], settings.get("logits", 0)
    ids = torch.arange(kept).expand(len(words), -1)
    tokens = sum(tile.cells for tile in tiles)
    rows = stored_rows(settings, tokens)
    semantics = torch.rand(rows or 1, width)
    return Trace(
        sample_id="plan",
        answer="",
        tiles=tiles,
        gaze=torch.rand(tokens),
        semantics=semantics if rows else semantics[0],
        mass=1.0,
        semantic_tokens=torch.arange(rows) if rows else None,
        steps=() if settings["steps"] == "none" else (Step("", "", torch.rand(tokens)),),
        logits=AnswerLogits(words, ids, torch.full(ids.shape, -math.log(kept + 1))) if kept else None,
    )
