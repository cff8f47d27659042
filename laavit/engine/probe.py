"""Samples that are not trained on, looked at now and then: the losses there, and where the student looks."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from laavit.backbones.rows import image_rows
from laavit.engine.distributed import rank_and_world
from laavit.registry import UserError
from laavit.structures import Encoded, StudentOutput, Trace
from laavit.targets.base import Target
from laavit.traces.grids import sample_mask

IN_BOX = "in_box"

logger = logging.getLogger("laavit.engine")


class InBoxShare(Target):
    """S_focus (Sec. 3.1) of the student's own rows: attention inside the boxes over all attention on the image.

    A target in form alone, so that it is recorded and averaged as the others are: nothing is learned from it. Layers
    are averaged before shares are taken; a sample without boxes counts for nothing.

    Args:
        rows: whose attention. layers: as of a target. depth: of the student.
    """

    needs_trace = False

    def __init__(self, rows: Sequence[str], layers: Sequence[int] | None, depth: int) -> None:
        super().__init__(0.0)
        self.rows, self.depth = tuple(rows), depth
        self.layers = tuple(layers) if layers is not None else None

    def prepare(self, encoded: Encoded, trace: Trace | None) -> dict[str, Tensor]:
        """``inside``: the share of each image token's cell inside the boxes, [N]; all -1 without boxes."""
        tiles, boxes = [span.tile for span in encoded.spans], encoded.sample.boxes
        if not boxes:
            return {"inside": torch.full((sum(tile.cells for tile in tiles),), -1.0)}
        return {"inside": sample_mask(boxes, tiles)}

    def count(self, roles: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        return (prepared["inside"] >= 0).all(1).sum()

    def forward(self, output: StudentOutput, roles: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        rows, valid = self.own_rows(output, self.own_layers(self.depth))
        looking, _ = image_rows(rows.float(), roles)  # [B, R, N]
        inside = prepared["inside"].to(looking)
        boxed = (inside >= 0).all(1)
        shares = (looking * inside[:, None]).sum(-1) / looking.sum(-1).clamp(min=1e-12)
        shares = (shares * valid).sum(1) / valid.sum(1).clamp(min=1)
        return shares[boxed].mean() if bool(boxed.any()) else shares.new_zeros(())


def in_box_share(targets: Mapping[str, Any], latents: int, depth: int) -> InBoxShare:
    """Of the rows that the recipe's gaze targets align, or those of the latents, or of header and answer."""
    aligned = [target for target in targets.values() if target.rows]
    if aligned:
        return InBoxShare(aligned[0].rows, aligned[0].layers, depth)
    return InBoxShare(("latents",) if latents else ("header", "answer"), None, depth)


@dataclass
class Probe:
    """What is looked at, and how.

    Args:
        dataset: map-style; all processes have the same. collate: samples -> arguments of ``forward``.
        batch_size: samples of one forward, of all processes together.
        targets: in the place of the model's own while it is looked at, by name; None leaves those.
    """

    dataset: Dataset
    collate: Any
    batch_size: int = 8
    targets: Mapping[str, Target] | None = None
    _batches: list[tuple[Any, float]] = field(default_factory=list)

    def batches(self) -> list[tuple[Any, float]]:
        """This process's batches and what each counts; as many as any other's, made once and kept.

        Where there is nothing left for a process, or less than a target can speak of, it looks at the first samples
        again and they count 0: with sharded weights all processes have to take part in every forward.

        Raises:
            UserError: there are fewer samples than a target needs at once.
        """
        rank, world = rank_and_world()
        count = len(self.dataset)  # type: ignore[arg-type]
        least = max((target.min_batch for target in (self.targets or {}).values()), default=1)
        if count < least:
            raise UserError(f"train.probe_samples: {count} samples, and a target of this recipe needs {least} at once")
        size = max(least, self.batch_size // world)
        for start in range(0, count if not self._batches else 0, size * world):
            own = range(start, min(start + size * world, count))[rank::world]
            enough = len(own) >= least
            items = [self.dataset[place] for place in (own if enough else range(least))]
            self._batches.append((self.collate(items), float(enough)))
        return self._batches

    def look(self, model: Any, wrapped: nn.Module, device: torch.device, precision: str) -> dict[str, Tensor]:
        """Sums and counts of every figure over this process's samples: {name: float64 [2]} on the device.

        Generators and the modes of all modules are as before afterwards, and no gradient is made.

        Args:
            model: the model itself. wrapped: what a strategy made of it, which is what is called.
        """
        sums: dict[str, Tensor] = {}
        with _untouched(model, device), self._watching(model), torch.no_grad():
            model.eval()
            for batch, weight in self.batches():
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                    outputs = wrapped(**batch)
                counts = model.counts(**batch) if hasattr(model, "counts") else {}
                size = len(getattr(next(iter(batch.values())), "samples", ())) or 1
                for name, value in outputs.items():
                    if name != "loss" and not name.startswith("gamma"):
                        count = weight * torch.as_tensor(counts.get(name, size), dtype=torch.float64, device=device)
                        pair = torch.stack([value.to(device, torch.float64) * count, count])
                        sums[name] = sums[name] + pair if name in sums else pair
        return sums

    @contextmanager
    def _watching(self, model: Any) -> Iterator[None]:
        if self.targets is None:
            yield
            return
        own = model.targets
        model.targets = nn.ModuleDict(dict(self.targets))
        try:
            yield
        finally:
            model.targets = own


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Training goes on afterwards as if nothing had been."""
    modes = {module: module.training for module in model.modules()}
    words, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            random.setstate(words)
            np.random.set_state(numbers)
