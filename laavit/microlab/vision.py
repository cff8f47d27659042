"""The tiny vision tower: a warm start with a label for every image token, and cached features.

Trained on one-word answers alone the tower learns nothing in minutes: the gradient has to find the right one of 36
tokens first. Dense labels (what stands in the token's cell) give it useful features; it is frozen afterwards.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from laavit.microlab.packing import SIDE, TOKENS
from laavit.microlab.scenes import COLOURS, FORMS, GRID, MARKS, SIZES, TONES, Scene, make_scene, render

logger = logging.getLogger(__name__)

#: attribute -> classes; 0 is an empty cell (or one without a mark), rows and columns have no such class
CLASSES = {"colour": 7, "form": 5, "size": 3, "tone": 3, "mark": 3, "row": GRID, "column": GRID}


def image_features(model: Any, processor: Any, scenes: Sequence[Scene]) -> Tensor:
    """What the decoder sees of the scenes' pictures: [B, N, D], through the processor itself."""
    batch = processor.image_processor(images=[render(scene) for scene in scenes], return_tensors="pt")
    found = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    return torch.stack(list(found.pooler_output))


@torch.no_grad()
def cache_features(model: Any, processor: Any, scenes: Sequence[Scene], chunk: int = 64) -> Tensor:
    """``image_features`` of many scenes: [len(scenes), N, D]."""
    starts = range(0, len(scenes), chunk)
    steps = track(starts, "image features", disable=len(scenes) < 2000)
    return torch.cat([image_features(model, processor, scenes[start : start + chunk]) for start in steps])


def token_labels(scene: Scene) -> dict[str, Tensor]:
    """The class of every image token for every attribute: long [N] each."""
    grid = {name: torch.zeros(GRID * GRID, dtype=torch.long) for name in CLASSES}
    for index, shape in enumerate(scene.shapes):
        grid["colour"][shape.cell] = 1 + list(COLOURS).index(shape.colour)
        grid["form"][shape.cell] = 1 + FORMS.index(shape.form)
        grid["size"][shape.cell] = 1 + list(SIZES).index(shape.size)
        grid["tone"][shape.cell] = 1 + list(TONES).index(shape.tone)
        for number in range(len(MARKS)):
            if scene.marks[number] == index:
                grid["mark"][shape.cell] = 1 + number
    grid["row"], grid["column"] = torch.arange(GRID * GRID) // GRID, torch.arange(GRID * GRID) % GRID
    token = torch.arange(TOKENS)
    cell = (token // SIDE) * GRID // SIDE * GRID + (token % SIDE) * GRID // SIDE
    return {name: labels[cell] for name, labels in grid.items()}


def warm_start(
    model: Any, processor: Any, steps: int = 500, batch_size: int = 32, lr: float = 2e-3, scene_seed: int = 1
) -> dict[str, float]:
    """Train the tower with dense labels on fresh scenes; returns the share of right non-empty tokens by attribute."""
    heads = nn.ModuleDict(
        {name: nn.Linear(model.config.text_config.hidden_size, classes) for name, classes in CLASSES.items()}
    )
    parameters = [*model.model.visual.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    accuracy: dict[str, float] = {}
    for step in track(range(steps), "vision warm start"):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        scenes = [make_scene(scene_seed, step * batch_size + i) for i in range(batch_size)]
        features = image_features(model, processor, scenes)
        found = [token_labels(scene) for scene in scenes]
        loss = features.new_zeros(())
        for name, head in heads.items():
            logits, wanted = head(features), torch.stack([labels[name] for labels in found])
            loss = loss + F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
            accuracy[name] = float((logits.argmax(-1) == wanted)[wanted > 0].float().mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            figures = " ".join(f"{name} {value:.2f}" for name, value in accuracy.items())
            logger.info("vision step %d: loss %.3f, %s", step + 1, loss.item(), figures)
    return accuracy
