"""What a process reads at once: how many samples, and a step on them, their images' way through the tower included."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch

from laavit.engine.examples import Load
from laavit.engine.kernels import use_kernels
from laavit.engine.planning.models import Shaped
from laavit.engine.planning.passes import Step, Vision, about_images, checkpoint, training_step, vision_pass
from laavit.engine.planning.spread import late_reduction
from laavit.engine.settings import TrainSettings
from laavit.registry import UserError
from laavit.structures import Encoded


def check_batch(settings: TrainSettings, gpus: int) -> None:
    """Raises: UserError: the batch does not divide among processes and micro-batches."""
    if not settings.tokens and settings.batch_size % (gpus * settings.accumulate):
        raise UserError(
            f"train.batch_size: {settings.batch_size} does not divide by {gpus} GPUs x train.accumulate = "
            f"{settings.accumulate} micro-batches; allowed: multiples of {gpus * settings.accumulate}"
        )


def units(settings: TrainSettings, load: Load, item: Encoded) -> tuple[int, int]:
    """Units (samples; with ``train.grouped`` groups) of a step, and of the largest of its micro-batches.

    Args:
        item: a sample; all are taken to be as long.

    Raises:
        UserError: the batch does not divide, or a budget of tokens does not hold a unit a micro-batch.
    """
    check_batch(settings, load.gpus)
    parts = load.gpus * settings.accumulate
    if not settings.tokens:
        return settings.batch_size, settings.batch_size // parts
    samples = load.questions if settings.grouped else 1
    shared = max(span.end for span in item.spans) if settings.shared_prefix else 0
    length = shared + samples * (len(item.input_ids) - shared)
    if settings.tokens < length * parts:
        what = "a group" if settings.grouped else "a sample"
        raise UserError(
            f"train.tokens: got {settings.tokens}; {what} is taken to have {length} tokens (--text, --answer, --image),"
            f" and each of a step's {parts} micro-batches must hold one; allowed: {length * parts} or more"
        )
    count = settings.tokens // length
    return count, -(-count // parts)


@dataclass
class Passes:
    """The passes of a plan.

    Args:
        items: the samples of a micro-batch. shares: processes that share a parameter under fsdp2.
    """

    shaped: Shaped
    load: Load
    items: list[Encoded]
    shares: int = 1
    _visions: dict[tuple[bool, str, torch.dtype], Vision] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The loss in parts is worked out here; what the others save is not counted.
        parts = replace(self.settings, kernels="none", compile=False)
        use_kernels(self.shaped.model, parts, torch.device("cpu"))

    @cached_property
    def settings(self) -> TrainSettings:
        """The recipe's."""
        settings: TrainSettings = self.shaped.recipe.build("train")
        return settings

    @cached_property
    def images(self) -> int:
        """Images of a micro-batch that pass the tower."""
        return self._images(self.items, self.settings)

    def _images(self, items: list[Encoded], settings: TrainSettings) -> int:
        if self.shaped.recipe.build("traces").vision_cache is not None:
            return 0
        return len({item.sample.images for item in items}) if settings.shared_prefix else len(items)

    def vision(self, checkpointing: bool, precision: str | None = None) -> Vision:
        """An image's way through the tower, in the dtype that the model has now. precision: of ``train.precision``."""
        backbone, precision = self.shaped.model.student.backbone, precision or self.settings.precision
        learns = self.shaped.model.student.learns("vision")  # else there is nothing to recompute
        key = checkpointing and learns, precision, next(backbone.model.parameters()).dtype
        if key not in self._visions:
            checkpoint(self.shaped.model, key[0])
            self._visions[key] = vision_pass(backbone, self.items[0], precision)
        return self._visions[key]

    def step(
        self, checkpointing: bool, precision: Literal["fp32", "bf16"] | None = None, accumulate: int | None = None
    ) -> Step:
        """A step with its images' way through the tower, FLOPs included; of one micro-batch.

        Args:
            precision, accumulate: in place of the recipe's.
        """
        own = self.settings
        settings = replace(own, precision=precision or own.precision, accumulate=accumulate or own.accumulate)
        return self._run(checkpointing, self.items, settings)

    def _run(self, checkpointing: bool, items: list[Encoded], settings: TrainSettings) -> Step:
        vision = self.vision(checkpointing, settings.precision)
        step = training_step(self.shaped, items, vision.features, self.load, checkpointing, settings, self.shares)
        images = self._images(items, settings)
        held, seen = (vision.held + vision.pixels) * images, (vision.peak + vision.pixels) * images
        gradients, after, late = step.gradients, 0, (0, 0)
        if images and vision.reached:  # the way back through a tower that learns comes last
            gradients += vision.gradients
            after, late = gradients, late_reduction(self.shaped.model, self.shares)
        return replace(
            step,
            peak=max(step.peak + held, seen + after),
            reduced=(max(step.reduced[0] + held, seen + late[0]), max(step.reduced[1] + held, seen + late[1])),
            activations=max(step.activations + held, seen),
            gradients=gradients,
            forward=step.forward + vision.forward * images,
            backward=step.backward + vision.backward * images,
        )

    def with_shared_prefix(self, checkpointing: bool) -> Step | None:
        """A step that reads shared beginnings once; None where it does already, or the samples share none."""
        if self.settings.shared_prefix or self.load.questions == 1 or self.settings.packing == "pack":
            return None
        images = max(len(self.items) // self.load.questions, 1)
        items = about_images(self.items[0], images, min(self.load.questions, len(self.items)))
        return self._run(checkpointing, items, replace(self.settings, shared_prefix=True))


def passes_of(shaped: Shaped, size: int | None, load: Load, shares: int = 1) -> Passes:
    """The passes of micro-batches of ``size`` units; None is as many as the recipe says.

    Raises:
        UserError: see ``units``.
    """
    settings: TrainSettings = shaped.recipe.build("train")
    item = shaped.example("student", load)
    size = units(settings, load, item)[1] if size is None else size
    return Passes(shaped, load, about_images(item, size, load.questions if settings.grouped else 1), shares)
