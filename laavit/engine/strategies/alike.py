"""Keeps the processes of a run on one path: what one of them runs, all run.

With fsdp2 every use of a block is a gathering of its weights in which all processes take part; with ddp every parameter
that learns has a gradient to exchange. A process whose samples need less than the others' would leave them waiting:

* without images in a micro-batch there is nothing for the vision tower: it looks at a blank picture, which counts 0;
* where latents are fed back and their number varies, each is a pass of its own: all batches take as many passes as the
  most latents need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from laavit.backbones.chat import PromptSettings
from laavit.data.aligned import image_keys_of
from laavit.engine.distributed import rank_and_world
from laavit.engine.settings import TrainSettings
from laavit.engine.strategies.base import Strategy
from laavit.registry import UserError
from laavit.structures import Batch, Sample

#: pixels of the blank picture's sides; a processor may make more of them
SIDE = 64


def check_alike(strategy: Strategy, settings: TrainSettings, datasets: Sequence[Any]) -> None:
    """Refuse samples that processes with shares of the weights would read in unequal numbers of passes.

    Args:
        datasets: what is trained on and what is looked at; those without ``samples`` say nothing of images.

    Raises:
        UserError: some have no image, and beginnings are to be shared.
    """
    if rank_and_world()[1] == 1 or not (strategy.shares_weights and settings.shared_prefix):
        return
    for dataset in datasets:
        keys = image_keys_of(getattr(dataset, "samples", ()))
        if without := sum(not key for key in keys):
            raise UserError(
                f"train.shared_prefix: {without} of {len(keys)} samples have no image; a micro-batch with one of them "
                "is read in one pass, and processes that read theirs in two would wait for it for ever (fsdp2): set "
                "train.shared_prefix=False, or take the strategy 'ddp'"
            )


@contextmanager
def kept_alike(model: Any, strategy: Strategy, dataset: Any) -> Iterator[None]:
    """While this is open, a model takes the same path in every process, whatever its samples are.

    Args:
        model: of the run, spread already. dataset: what is trained on; with a ``cache`` of image features no process
            runs the tower.
    """
    student = getattr(model, "student", None)
    backbone = getattr(student, "backbone", None)
    if rank_and_world()[1] == 1 or student is None or backbone is None:
        yield
        return
    learns = any(student.learns(part) for part in ("vision", "projector"))
    with ExitStack() as stack:
        if strategy.shares_weights:
            backbone.even_passes = True
            stack.callback(setattr, backbone, "even_passes", False)
        if getattr(dataset, "cache", None) is None and (strategy.shares_weights or learns):
            blank = Blank(student)
            for handle in (
                student.register_forward_pre_hook(blank.look, with_kwargs=True),
                student.register_forward_hook(blank.join),
            ):
                stack.callback(handle.remove)
        yield


class Blank:
    """A picture that the tower looks at before a batch without images is read, and that changes nothing.

    Args:
        student: whose tower.
    """

    def __init__(self, student: Any) -> None:
        self.student, self.features = student, tuple[Tensor, ...]()

    @cached_property
    def vision(self) -> dict[str, Tensor]:
        """What the family's processor makes of it, as a batch has it."""
        sample = Sample("blank", (Path("blank"),), "?", "")
        prompt = self.student.builder(PromptSettings()).prompt_of(sample, [Image.new("RGB", (SIDE, SIDE))])
        found: dict[str, Tensor] = self.student.backbone.family.batch([prompt.vision])
        return found

    def look(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder, as with real images: processes gather weights in one order."""
        batch: Batch = args[0] if args else kwargs["batch"]
        if any(batch.spans):
            return
        backbone = self.student.backbone
        vision = {name: tensor.to(backbone.device) for name, tensor in self.vision.items()}
        self.features = backbone.family.image_features(backbone.model, vision)

    def join(self, student: nn.Module, args: tuple[Any, ...], hidden: Tensor) -> Tensor | None:
        """Zero times its features: what learns in the tower gets a gradient, of zeros."""
        features, self.features = self.features, ()
        learned = [(each * 0).sum().to(hidden.dtype) for each in features if each.requires_grad]
        return hidden + sum(learned) if learned else None
