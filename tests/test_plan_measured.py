"""The memory that laavit plans against PyTorch's own account of a real step, for every kind of batch and student."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import LOAD, recipe_of
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForImageTextToText

from laavit.backbones import collate
from laavit.engine import plan as planning
from laavit.engine.planning.batches import Passes
from laavit.engine.planning.passes import prepared_targets
from laavit.engine.strategies import enable_gradient_checkpointing
from laavit.model import LaViT, build_model

#: what the meter may differ by from the allocator's own account of the same step
TOLERANCE = 0.02

SHARED = {"grouped": True, "shared_prefix": True, "batch_size": 2}
#: what the recipe has beside the plain one -> its student's and its training's settings
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a frozen tower, padded": ({}, {}),
    "the same in bf16": ({}, {"precision": "bf16"}),
    "checkpointing": ({}, {"gradient_checkpointing": True}),
    "checkpointing, bf16": ({}, {"gradient_checkpointing": True, "precision": "bf16"}),
    "packed": ({}, {"packing": "pack"}),
    "4 questions an image, shared prefix": ({}, SHARED),
    "the same, packed, bf16": ({}, {**SHARED, "packing": "pack", "precision": "bf16"}),
    "LoRA": ({"lora": {"rank": 8}}, {}),
    "LoRA, checkpointing, bf16": ({"lora": {"rank": 8}}, {"gradient_checkpointing": True, "precision": "bf16"}),
    "a tower that learns": ({"freeze": []}, {}),
    "a tower that learns, checkpointing": ({"freeze": []}, {"gradient_checkpointing": True}),
    "accumulate 4": ({}, {"batch_size": 32, "accumulate": 4}),
}
#: those that are held to it in every run of the tests
ALWAYS = ("the same in bf16", "4 questions an image, shared prefix", "a tower that learns, checkpointing")


@pytest.fixture(scope="module")
def wide_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, wider and deeper, so that tensors outweigh what the allocator rounds up."""
    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(tiny_folder)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 128, 384, 6
    text.layer_types = ["full_attention"] * 6
    text.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
    config.vision_config.out_hidden_size = 128
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


def measured_step(model: LaViT, passes: Passes) -> int:
    """The highest number of bytes that PyTorch's CPU allocator held during one real step of a few micro-batches, over
    what it held before; the pixels are among them."""
    settings, shaped = passes.settings, passes.shaped
    targets = prepared_targets(shaped, passes.items[0], len(passes.items), passes.load)
    model.train()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        shown: dict[Any, torch.Tensor] = {}
        for item in passes.items:
            if item.sample.images not in shown or not settings.shared_prefix:
                shown[item.sample.images] = torch.randn(item.vision["pixel_values"].shape)
        items = [
            replace(item, vision={**item.vision, "pixel_values": shown[item.sample.images]}) for item in passes.items
        ]
        pad, packed = 0, settings.packing == "pack"
        batch = collate(items, model.student.backbone.family, pad, settings.shared_prefix, packed)
        del items, shown
        batch.targets = targets
        for _ in range(settings.accumulate):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
                losses = model(batch)
            losses["loss"].backward()
            del losses
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    "case", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_memory_equals_a_measured_step(case: str, wide_folder: Path) -> None:
    given, train = CASES[case]
    student = {"name": "hf", "path": str(wide_folder), **given}
    recipe = recipe_of(wide_folder, student=student, train={"batch_size": 8, **train})
    passes = planning.passes_of(planning.shape_models(recipe), None, replace(LOAD, questions=4))
    planned = passes.step(passes.settings.gradient_checkpointing).peak
    real = build_model(recipe, {"width": 128, "depth": 6})
    if passes.settings.gradient_checkpointing:
        enable_gradient_checkpointing(real)
    measured = measured_step(real, passes)
    assert measured > 10e6, "too small to compare"
    assert abs(planned - measured) <= TOLERANCE * measured, f"planned {planned:,}, measured {measured:,}"
