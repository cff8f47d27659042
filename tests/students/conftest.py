"""Every family's tiny model, written once a session, and what one step of training moves in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny
from PIL import Image

from laavit.backbones import PromptSettings, collate
from laavit.engine.optim import build_adamw, unique_parameters
from laavit.engine.settings import TrainSettings
from laavit.latents import LearnedLatents
from laavit.model import LaViT
from laavit.structures import Batch, Sample
from laavit.students import HFStudent


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's folder; treat as read-only."""
    return cache(lambda family: tiny(family, tmp_path_factory.mktemp("students") / family))


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """An image of several tiles, where a family cuts images up."""
    path = tmp_path_factory.mktemp("wide") / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 100, 3), dtype=np.uint8)).save(path)
    return Sample("wide", (path,), "What colour is it?", "blue")


@dataclass
class Workshop:
    """Students of every family, and a step of training."""

    folder_of: Callable[[str], Path]
    sample: Sample

    def student(self, family: str, latents: int = 3, dtype: str = "float32", **arguments: Any) -> HFStudent:
        student = HFStudent(str(self.folder_of(family)), dtype, **arguments)
        student.setup(LearnedLatents(latents, "mean", 0.5) if latents else None, torch.Generator().manual_seed(3))
        return student

    def batch(self, student: HFStudent) -> Batch:
        builder = student.builder(PromptSettings(system="Look."))
        item = builder.encode(self.sample, self.sample.answer)
        return collate([item], student.backbone.family, student.backbone.tokenizer.pad_token_id)

    def step(self, student: HFStudent, batch: Batch | None = None, count: int = 1) -> None:
        """Steps of the engine's optimizer with weight decay, which would move what only looks frozen."""
        model = LaViT(student).train()
        settings = TrainSettings(lr=1e-2, weight_decay=0.1)
        optimizer = build_adamw(unique_parameters(model.trainable_parameters()), settings)
        for _ in range(count):
            optimizer.zero_grad()
            model(batch or self.batch(student))["loss"].backward()
            optimizer.step()

    def moved(self, student: HFStudent) -> Mapping[str, torch.Tensor]:
        """Parameters that a step moves: name -> which of their rows."""
        before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
        self.step(student)
        changed = {n: (p.detach() != before[n]).reshape(len(p), -1).any(1) for n, p in student.model.named_parameters()}
        return {name: rows.nonzero().flatten() for name, rows in changed.items() if rows.any()}


@pytest.fixture(scope="session")
def workshop(folder_of: Callable[[str], Path], wide: Sample) -> Workshop:
    return Workshop(folder_of, wide)
