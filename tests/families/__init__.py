"""Tiny random models of every family: its own model class, its own processor class and geometry, offline.

``tiny("qwen2_5_vl", folder)`` writes a Hugging Face folder that ``Backbone.load`` opens like one from the hub. A
family's module in this package has one function ``build(family, seed) -> (model, processor)``; the sizes are tiny, the
tokenizer is made from scratch with the family's real special tokens, and the chat template has the structure of the
real one.
"""

from __future__ import annotations

import importlib
from pathlib import Path

#: family -> the module of this package that builds it
MODULES = {
    "qwen2_vl": "qwen",
    "qwen2_5_vl": "qwen",
    "qwen3_vl": "qwen",
    "qwen3_vl_moe": "qwen",
    "idefics3": "idefics",
    "smolvlm": "idefics",
    "llava": "llava",
    "llava_onevision": "llava_onevision",
    "internvl": "internvl",
    "gemma3": "gemma3",
}
FAMILY_NAMES = tuple(MODULES)


def tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny random model of a family with its processor; the weights are float32 (load them as any dtype)."""
    model, processor = importlib.import_module(f"families.{MODULES[family]}").build(family, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
