"""The recipe's own passes on shapes: a training step, the vision tower, the teacher's recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laavit.backbones.base import Backbone, collate
from laavit.backbones.rows import row_positions
from laavit.data.aligned import header_of
from laavit.engine.examples import Load, example_trace, stored_rows
from laavit.engine.planning.models import Shaped
from laavit.engine.planning.spread import Reduction
from laavit.engine.settings import TrainSettings
from laavit.engine.shapes import Meter, bytes_of
from laavit.engine.strategies import enable_gradient_checkpointing
from laavit.structures import Batch, Encoded
from laavit.targets.base import stack
from laavit.teachers.recording import recording
from laavit.teachers.settings import ExtractSettings


@dataclass(frozen=True)
class Vision:
    """What an image takes on its way through tower and projector.

    Args:
        pixels: bytes. peak: bytes at the highest, pixels left out. held: those that wait for the backward pass.
        gradients: bytes of what learns on this way. reached: ids of these parameters.
        forward, backward: FLOPs. features: what the decoder reads of it, [N, D], a shape.
    """

    pixels: int
    peak: int
    held: int
    gradients: int
    reached: frozenset[int]
    forward: int
    backward: int
    features: Tensor


def checkpoint(model: nn.Module, wanted: bool) -> None:
    """Have a model in training recompute its activations, or not."""
    model.train()
    if wanted:
        enable_gradient_checkpointing(model)
        return
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False  # type: ignore[assignment]


def vision_pass(backbone: Backbone, item: Encoded, precision: str) -> Vision:
    """The images of one sample through the vision tower as it is, and back where it learns."""
    meter = Meter()
    meter.ignore([*backbone.model.parameters(), *backbone.model.buffers(), *item.vision.values()])
    with torch.autocast("cpu", torch.bfloat16, precision == "bf16"), meter:
        features = backbone.family.image_features(backbone.model, item.vision)
        whole = features[0] if len(features) == 1 else torch.cat(list(features))
        held, forward, peak = meter.live - bytes_of(features), meter.flops, meter.peak
        if whole.requires_grad:
            whole.sum().backward()
    learned = [p for p in backbone.model.parameters() if p.grad is not None]
    reached, gradients = frozenset(map(id, learned)), bytes_of(p.grad for p in learned)
    backbone.model.zero_grad(set_to_none=True)
    held = held if whole.requires_grad else 0
    return Vision(
        bytes_of(item.vision.values()), peak, held, gradients, reached, forward, meter.flops - forward, whole.detach()
    )


def without_pixels(item: Encoded) -> Encoded:
    """A sample whose features are known: what it holds of pixels is not copied about."""
    return replace(item, vision={key: value for key, value in item.vision.items() if not key.startswith("pixel_")})


def about_images(item: Encoded, images: int, questions: int) -> list[Encoded]:
    """So many equal images with so many samples about each."""
    pictures = [replace(item.sample, images=(Path(str(number)),)) for number in range(images)]
    return [replace(item, sample=sample) for sample in pictures for _ in range(questions)]


def batch_of(items: Sequence[Encoded], features: Tensor, backbone: Backbone, settings: TrainSettings) -> Batch:
    """A micro-batch as the training puts it together, its image features [N, D] as shapes."""
    given = [replace(item, features=features) for item in items]
    return collate(given, backbone.family, 0, share=settings.shared_prefix, pack=settings.packing == "pack")


def prepared_targets(shaped: Shaped, item: Encoded, size: int, load: Load) -> dict[str, dict[str, Tensor]]:
    """What the recipe's targets prepare for ``size`` samples with traces of their teachers' shapes."""
    one, teacher = {}, shaped.teacher
    for name, target in shaped.model.named_targets.items():
        trace, settings = None, shaped.recipe.build("extract").card()
        if target.needs_trace and target.store is not None:  # its maps are taken to be of the student's size
            header = header_of(target.store)
            tiles = tuple(span.tile for span in item.spans)
            trace = example_trace(tiles, header["width"], settings | header.get("settings", {}), item)
        elif target.needs_trace:
            assert teacher is not None, "shape_models asks for a teacher"
            tiles = tuple(span.tile for span in shaped.example("teacher", load).spans)
            trace = example_trace(tiles, teacher.width, settings, item)
        one[name] = target.prepare(item, trace)
    return {name: stack([prepared] * size) for name, prepared in one.items()}


@dataclass(frozen=True)
class Step:
    """What a training step takes beside weights and optimizer's state.

    Args:
        peak: bytes at the highest. activations: the same without gradients. gradients: bytes.
        reduced: the peak where fsdp2 exchanges gradients, their shares among it; and where these go to the host.
        forward, backward: FLOPs of one micro-batch, its images' left out; what checkpointing computes again is in
            ``backward``. losses: their names. unreached: trainable parameters that no loss reaches.
    """

    peak: int
    reduced: tuple[int, int]
    activations: int
    gradients: int
    forward: int
    backward: int
    losses: tuple[str, ...]
    unreached: tuple[str, ...]


def training_step(
    shaped: Shaped,
    items: Sequence[Encoded],
    features: Tensor,
    load: Load,
    checkpointing: bool = False,
    settings: TrainSettings | None = None,
    shares: int = 1,
) -> Step:
    """The recipe's forward and backward on shapes, a micro-batch at once; twice where gradients add up: from the second
    on, they exist when the forward begins.

    Args:
        items: the samples of the micro-batch. features: of an image.
        settings: in place of the recipe's own. shares: processes that share a parameter, where they do.
    """
    settings = settings or shaped.recipe.build("train")
    model = shaped.model
    checkpoint(model, checkpointing)
    trainable = [p for p in model.parameters() if p.requires_grad]
    meter = Meter()
    meter.ignore([*model.parameters(), *model.buffers()])
    reductions = Reduction(model, shares), Reduction(model, None)
    meter.watch(trainable, reductions)
    batch = batch_of([without_pixels(item) for item in items], features, model.student.backbone, settings)
    batch.targets = prepared_targets(shaped, items[0], len(items), load)
    logged: Mapping[str, Tensor] = {}
    forward = backward = 0
    for _ in range(min(settings.accumulate, 2)):
        with meter:
            before = meter.flops
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
                logged = model(batch)
            forward = meter.flops - before
            logged["loss"].backward()
            backward = meter.flops - before - forward
    unreached = tuple(n for n, p in model.named_parameters() if p.requires_grad and p.grad is None)
    model.zero_grad(set_to_none=True)
    losses = tuple(name for name in logged if name != "loss" and not name.startswith("gamma"))
    reduced = reductions[0].peak, reductions[1].peak
    return Step(meter.peak, reduced, meter.peak_apart, meter.apart, forward, backward, losses, unreached)


def extraction_pass(shaped: Shaped, load: Load) -> dict[str, int]:
    """The teacher's recording pass on shapes, one batch of the recipe's extraction; bytes over its weights."""
    assert shaped.teacher is not None, "called where the recipe has a teacher"
    settings: ExtractSettings = shaped.recipe.build("extract")
    backbone, item = shaped.teacher, shaped.example("teacher", load)
    with torch.no_grad():
        vision = vision_pass(backbone, item, "fp32")
    given = [replace(without_pixels(item), features=vision.features)] * settings.batch_size
    batch = collate(given, backbone.family, 0)
    meter = Meter()
    meter.ignore([*backbone.model.parameters(), *backbone.model.buffers()])
    with torch.no_grad(), meter:
        kinds = settings.rows if settings.steps == "none" else (*settings.rows, "predicting")
        rows = torch.cat([row_positions(batch, kind) for kind in kinds], 1)
        context = recording(backbone, settings, rows)
        hidden = backbone.forward(batch, context)
        context.mean_rows()
        hidden.float()
    text: Any = backbone.model.config.get_text_config()  # type: ignore[union-attr, operator]
    heads = text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    cached = len(item.input_ids) + settings.max_new_tokens
    keys = 2 * backbone.depth * heads * cached * settings.batch_size * dtype_of_weights(backbone.model).itemsize
    tokens = sum(span.tile.cells for span in item.spans)
    # float32, with an int32 index where sparse
    gaze = 8 * min(settings.gaze_top_k, tokens) if settings.gaze_top_k else 4 * tokens
    steps = 1 if settings.steps == "none" else 1 + load.answer  # the aggregate, and at most one map a token
    stored = stored_rows(settings.card(), tokens)
    semantics = max(stored, 1) * backbone.width * (4 if settings.semantics_dtype == "float32" else 2) + 4 * stored
    return {
        "weights": bytes_of(backbone.model.parameters()),
        "activations": max(meter.peak, vision.peak * settings.batch_size) + vision.pixels * settings.batch_size,
        "key-value cache": keys,
        "image_tokens": tokens,
        "trace": gaze * steps + semantics + (4 + 8 * settings.logits) * load.answer * bool(settings.logits),
    }


def dtype_of_weights(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first parameter."""
    return next(model.parameters()).dtype
