"""What a recipe needs before anything is loaded: parameters by part, memory by part, storage of its traces.

Student and teacher are built from their configurations as shapes (``laavit.engine.shapes``); then the recipe's own
training step and extraction pass run on those shapes, so that latents, heads and gate are shown to fit, and the memory
is counted by operation, under the recipe's precision, with and without checkpointing, instead of by a formula.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from laavit.backbones.base import Backbone, collate
from laavit.backbones.chat import IGNORED
from laavit.backbones.rows import row_positions
from laavit.data.aligned import header_of
from laavit.engine.examples import example_trace, stored_rows
from laavit.engine.settings import TrainSettings
from laavit.engine.shapes import (
    Blueprint,
    Meter,
    as_shapes,
    blueprint,
    bytes_of,
    fake_mode,
    parameters_by_part,
    shaped_backbone,
)
from laavit.engine.strategies import enable_gradient_checkpointing
from laavit.latents import NO_LATENTS, LatentLayout, latent_tokens
from laavit.model import LaViT, build_gate, build_targets, check_layers
from laavit.recipe import Recipe
from laavit.registry import UserError
from laavit.structures import Batch, Box, Encoded, Role, Sample, Span, Tile
from laavit.students.hf import HFStudent
from laavit.students.lora import LoraSettings
from laavit.targets import ConceptTarget
from laavit.targets.base import stack
from laavit.teachers.recording import recording
from laavit.teachers.settings import ExtractSettings

ASSUMPTIONS = (
    "every sample has one image at the largest area the processor allows",
    "attention keeps what flash or memory-efficient SDPA keeps, never an S x S map",
    "weights, gradients and both AdamW moments are float32 where the student's dtype is (these are the master weights)",
    "the allocator's fragmentation and the CUDA context (about 1 GB) come on top",
)


#: model types whose image is one grid, its size chosen by area: what ``grid_of`` and ``example`` stand for
PLANNED = ("qwen2_vl", "qwen2_5_vl")


@dataclass(frozen=True)
class Load:
    """What one sample is assumed to hold.

    Args:
        text: tokens of the system prompt, the question and the chat's markup.
        answer: tokens of the answer, its end included.
        gpus: processes that share a batch, each with a whole copy of the model (DDP).
    """

    text: int = 128
    answer: int = 16
    gpus: int = 1

    def __post_init__(self) -> None:
        for name, least in (("text", 8), ("answer", 1), ("gpus", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name}: got {getattr(self, name)}; allowed: {least} or more")


def grid_of(config: Any, pixels: int) -> tuple[int, int]:
    """The largest near-square grid of image tokens (height, width) within an area in pixels."""
    side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    count = max(pixels // side**2, 1)
    root = math.isqrt(count)
    return max(((height, count // height) for height in range(max(root * 3 // 4, 1), root + 1)), key=math.prod)


def example(backbone: Backbone, grid: tuple[int, int], layout: LatentLayout, load: Load) -> Encoded:
    """One sample of assumed length: roles, labels, spans and positions are real, its words are not.

    Where the number of latents varies it has the most.
    """
    latents = layout.most
    before, tokens, header = load.text // 2, grid[0] * grid[1], 3
    after = load.text - before - header
    answer = load.answer + (1 if latents else 0)  # the separator's query is an answer query
    roles = [Role.OTHER] * before + [Role.IMAGE] * tokens + [Role.QUESTION] * after + [Role.OTHER] * header
    roles += [Role.LATENT] * latents + [Role.ANSWER] * answer
    ids = torch.ones(len(roles), dtype=torch.long)
    ids[before : before + tokens] = backbone.family.image_token_id
    if latents:
        start = before + tokens + after + header
        ids[start : start + latents + 1] = torch.tensor(
            backbone.tokenizer.convert_tokens_to_ids(latent_tokens(latents))
        )
    labels = torch.full(ids.shape, IGNORED)
    labels[-load.answer - layout.written - 1 : -1] = 1
    merge = backbone.family.merge
    vision = {"image_grid_thw": torch.tensor([[1, grid[0] * merge, grid[1] * merge]])}
    return Encoded(
        input_ids=ids,
        roles=torch.tensor(roles, dtype=torch.uint8),
        labels=labels,
        spans=(Span(before, Tile(*grid)),),
        position_ids=backbone.family.positions(ids, vision),
        header=(before + tokens + after, before + tokens + after + header),
        vision=vision,
        sample=Sample("plan", (), "", "", (Box(0.25, 0.25, 0.75, 0.75),)),
    )


def batch_of(backbone: Backbone, item: Encoded, size: int, mode: FakeTensorMode) -> Batch:
    """``size`` equal samples, their image features as fake tensors."""
    with mode:
        features = torch.empty(item.spans[0].tile.cells, backbone.width, dtype=_dtype(backbone.model))
    return collate([replace(item, features=features)] * size, backbone.family, 0)


@dataclass
class Shaped:
    """A recipe's student and teacher as shapes."""

    recipe: Recipe
    mode: FakeTensorMode
    model: LaViT
    plan: Blueprint
    teacher: Backbone | None
    teacher_plan: Blueprint | None

    def grid(self, key: str, plan: Blueprint) -> tuple[int, int]:
        return grid_of(plan.config, self.recipe.arguments(key).get("max_pixels") or plan.max_pixels)


def blueprints(recipe: Recipe) -> dict[str, Blueprint]:
    """Blueprints of the recipe's student and teacher, checked before anything is built.

    Raises:
        UserError: a part is no Hugging Face model, or of a family whose image tokens are not one grid by area.
    """
    found = {}
    for key, kind in (("student", "HFStudent"), ("teacher", "HFTeacher")):
        if key == "teacher" and not recipe.has(key):
            continue
        if (recipe.config[key] or {}).get("type") != kind:
            raise UserError(f"{key}: plan works out {kind} alone, got {(recipe.config[key] or {}).get('type')}")
        path = recipe.arguments(key)["path"]
        found[key] = blueprint(path)
        family = found[key].config.model_type
        if family not in PLANNED:
            raise UserError(
                f"{key}: plan works out the families {', '.join(PLANNED)} alone, and '{path}' is of type '{family}'"
            )
    return found


def shape_models(recipe: Recipe) -> Shaped:
    """Build student (with latents, gate, targets) and teacher of a recipe without weights.

    Raises:
        UserError: a part is no Hugging Face model, a configuration is not known, or the parts do not fit one another.
    """
    plans = blueprints(recipe)
    mode, gate = fake_mode(), build_gate(recipe)
    given = recipe.arguments("student")
    latents = recipe.build("latents") if recipe.has("latents") else None
    plan = plans["student"]
    backbone = shaped_backbone(
        plan, given["dtype"], given["attention"], mode, latents.layout.most + 1 if latents else 0
    )
    lora = LoraSettings(**given["lora"]) if given["lora"] is not None else None
    student = HFStudent.of(backbone, given["path"], given["freeze"], lora)
    student.setup(latents, torch.Generator().manual_seed(0))
    as_shapes(student.model, mode)
    check_layers(gate, student)
    teacher, teacher_plan, header = None, None, {}
    if recipe.has("teacher"):
        teacher_plan = plans["teacher"]
        teacher = shaped_backbone(teacher_plan, recipe.arguments("teacher")["dtype"], "laavit", mode)
        teacher.model.eval().requires_grad_(False)
        header = {"width": teacher.width, "depth": teacher.depth, "settings": recipe.build("extract").card()}
    with mode:
        targets = build_targets(recipe, student, header)
    for name, target in targets.items():
        if target.needs_trace and target.store is None and teacher is None:
            raise UserError(f"targets.{name} needs traces, and the recipe has no teacher: their width is not known")
        if isinstance(target, ConceptTarget) and target.match == "hungarian":
            target.match = "order"  # which rows are matched is no matter of shapes
    model = LaViT(student, gate, targets)
    return Shaped(recipe, mode, model, plan, teacher, teacher_plan)


def vision_pass(backbone: Backbone, grid: tuple[int, int], mode: FakeTensorMode, precision: str) -> dict[str, int]:
    """One image through the vision tower: its highest bytes, and those still held when it is done."""
    config, merge = backbone.model.config.vision_config, backbone.family.merge  # type: ignore[union-attr]
    patches = grid[0] * grid[1] * merge**2
    size = config.in_channels * config.temporal_patch_size * config.patch_size**2  # type: ignore[union-attr, operator]
    meter = Meter()
    meter.ignore([*backbone.model.parameters(), *backbone.model.buffers()])
    tower = backbone.family.vision_tower(backbone.model)
    learns = any(p.requires_grad for p in tower.parameters())
    with torch.set_grad_enabled(learns), torch.autocast("cpu", torch.bfloat16, precision == "bf16"), meter:
        with mode:
            pixels = torch.empty([patches, int(size)], dtype=_dtype(backbone.model))
        grids = torch.tensor([[1, grid[0] * merge, grid[1] * merge]])
        features = backbone.family.image_features(backbone.model, {"pixel_values": pixels, "image_grid_thw": grids})
        held = meter.live - bytes_of(features)
    return {"peak": meter.peak, "held": held if learns else 0}


def prepared_targets(shaped: Shaped, item: Encoded, size: int) -> dict[str, dict[str, Tensor]]:
    """What the recipe's targets prepare for ``size`` samples with traces of their teachers' shapes."""
    one, teacher = {}, shaped.teacher
    for name, target in shaped.model.named_targets.items():
        trace, settings = None, shaped.recipe.build("extract").card()
        if target.needs_trace and target.store is not None:  # its maps are taken to be of the student's size
            header = header_of(target.store)
            tiles = tuple(span.tile for span in item.spans)
            trace = example_trace(tiles, header["width"], settings | header.get("settings", {}), item)
        elif target.needs_trace:
            assert teacher is not None and shaped.teacher_plan is not None, "shape_models asks for a teacher"
            trace = example_trace((Tile(*shaped.grid("teacher", shaped.teacher_plan)),), teacher.width, settings, item)
        one[name] = target.prepare(item, trace)
    return {name: stack([prepared] * size) for name, prepared in one.items()}


def training_step(shaped: Shaped, size: int, load: Load, checkpointing: bool, passes: int = 1) -> dict[str, Any]:
    """The recipe's forward and backward on shapes, ``size`` samples at once.

    Args:
        passes: micro-batches whose gradients add up; from the second on, gradients exist when the forward begins.

    Returns: ``peak`` (bytes over weights and optimizer states), ``activations`` (the same without gradients),
    ``gradients``, ``losses`` (their names), ``logits`` (bytes of the logits at labels), ``without_gradient``
    (trainable parameters that no loss reaches).
    """
    settings: TrainSettings = shaped.recipe.build("train")
    model, backbone = shaped.model.train(), shaped.model.student.backbone
    if checkpointing:
        enable_gradient_checkpointing(model)
    grid = shaped.grid("student", shaped.plan)
    layout = shaped.model.student.layout
    item = example(backbone, grid, layout, load)
    trainable = [p for p in model.parameters() if p.requires_grad]
    meter = Meter()
    meter.ignore([*model.parameters(), *model.buffers()])
    meter.watch(trainable)
    batch = batch_of(backbone, item, size, shaped.mode)
    batch.targets = prepared_targets(shaped, item, size)
    logged: Mapping[str, Tensor] = {}
    for _ in range(passes):
        with meter:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
                logged = model(batch)
            logged["loss"].backward()
    unreached = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    result: dict[str, Any] = {"peak": meter.peak, "activations": meter.peak_apart, "gradients": meter.apart}
    model.zero_grad(set_to_none=True)
    rows, vocabulary = size * (load.answer + layout.written), backbone.model.get_output_embeddings().weight.shape[0]
    result |= {
        "losses": [name for name in logged if name != "loss" and not name.startswith("gamma")],
        "without_gradient": unreached,
    }
    return result | {
        "sequence": len(item.input_ids),
        "image_tokens": grid[0] * grid[1],
        "logits": rows * vocabulary * 4,
    }


def extraction_pass(shaped: Shaped, load: Load) -> dict[str, int]:
    """The teacher's recording pass on shapes, one batch of the recipe's extraction; bytes over its weights."""
    assert shaped.teacher is not None and shaped.teacher_plan is not None, "called where the recipe has a teacher"
    settings: ExtractSettings = shaped.recipe.build("extract")
    grid, backbone = shaped.grid("teacher", shaped.teacher_plan), shaped.teacher
    item = example(backbone, grid, NO_LATENTS, load)
    batch = batch_of(backbone, item, settings.batch_size, shaped.mode)
    meter = Meter()
    meter.ignore([*backbone.model.parameters(), *backbone.model.buffers()])
    with torch.no_grad(), meter:
        kinds = settings.rows if settings.steps == "none" else (*settings.rows, "predicting")
        rows = torch.cat([row_positions(batch, kind) for kind in kinds], 1)
        context = recording(backbone, settings, rows)
        hidden = backbone.forward(batch, context)
        context.mean_rows()
        hidden.float()
    text = backbone.model.config.get_text_config()  # type: ignore[union-attr, operator]
    heads = text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    cached = len(item.input_ids) + settings.max_new_tokens
    keys = 2 * backbone.depth * heads * cached * settings.batch_size * _dtype(backbone.model).itemsize
    tokens = grid[0] * grid[1]
    gaze = 8 * settings.gaze_top_k if settings.gaze_top_k else 4 * tokens  # float32, with an int32 index where sparse
    steps = 1 if settings.steps == "none" else 1 + load.answer  # the aggregate, and at most one map a token
    stored = max(stored_rows(settings.card(), tokens), 1)
    vision = vision_pass(backbone, grid, shaped.mode, "fp32")["peak"] * settings.batch_size
    return {
        "weights": bytes_of(backbone.model.parameters()),
        "activations": max(meter.peak, vision),
        "key-value cache": keys,
        "image_tokens": tokens,
        "trace": gaze * steps + 4 * stored * backbone.width + 8 * settings.logits * load.answer,
    }


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def training_memory(shaped: Shaped, size: int, load: Load) -> tuple[dict[str, dict[str, int]], dict[str, Any]]:
    """Bytes by part of one GPU, ``plain`` and ``checkpointed``, and what the last simulated step told of itself."""
    settings: TrainSettings = shaped.recipe.build("train")
    model = shaped.model
    trainable = [p for p in model.parameters() if p.requires_grad]
    weights, states = bytes_of(model.parameters()), 2 * bytes_of(trainable)
    buckets = bytes_of(trainable) if load.gpus > 1 else 0  # DDP's buckets are a second copy of the gradients
    vision = {"peak": 0, "held": 0}
    if shaped.recipe.build("traces").vision_cache is None:
        grid = shaped.grid("student", shaped.plan)
        vision = vision_pass(model.student.backbone, grid, shaped.mode, settings.precision)
    found, step = {}, {}
    for name in ("plain", "checkpointed"):  # in this order: what is switched on stays on
        step = training_step(shaped, size, load, name == "checkpointed", min(settings.accumulate, 2))
        held = vision["held"] * size
        found[name] = {
            "weights": weights,
            "gradients": step["gradients"],
            "optimizer": states,
            "buckets": buckets,
            "activations": max(step["activations"] + held, vision["peak"] * size),
            "peak": weights + states + buckets + max(step["peak"] + held, vision["peak"] * size),
        }
    return found, step


def describe_gate(gate: Any, steps: int) -> dict[str, Any] | None:
    """The ends of a gate's schedule."""
    if gate is None:
        return None
    return {
        "type": type(gate).__name__,
        "paths": list(gate.paths),
        "gamma_first": gate.gamma(0),
        "gamma_last": gate.gamma(steps - 1),
        "open_from": next((step for step in range(steps) if gate.gamma(step) == 1.0), None),
    }


def make_plan(recipe: Recipe, load: Load) -> dict[str, Any]:
    """Everything ``laavit plan`` tells, as plain data; sizes are in bytes.

    Raises:
        UserError: see ``shape_models``; or the batch does not divide among processes and micro-batches.
    """
    settings: TrainSettings = recipe.build("train")
    if settings.batch_size % (load.gpus * settings.accumulate):
        raise UserError(
            f"train.batch_size: {settings.batch_size} does not divide by {load.gpus} GPUs x train.accumulate = "
            f"{settings.accumulate} micro-batches"
        )
    size = settings.batch_size // (load.gpus * settings.accumulate)
    shaped = shape_models(recipe)
    student, given = shaped.model.student, recipe.arguments("student")
    counts = parameters_by_part(shaped.model)
    training, step = training_memory(shaped, size, load)
    assumptions = [f"{load.text} tokens of text and {load.answer} of answer a sample", *ASSUMPTIONS]
    if settings.grouped:
        assumptions.append("train.grouped counts groups of samples; one sample a group is assumed")
    rows = student.model.get_input_embeddings().weight.shape[0]
    return {
        "recipe": recipe.config["title"],
        "student": {"path": given["path"], "configuration": shaped.plan.source, "dtype": given["dtype"]},
        "teacher": recipe.arguments("teacher").get("path") if recipe.has("teacher") else None,
        "parameters": counts,
        "total": {kind: sum(part[kind] for part in counts.values()) for kind in ("all", "trainable")},
        "latents": {"count": student.latents, "embedding_rows": rows},
        "gate": describe_gate(shaped.model.gate, settings.steps),
        "step": {
            "gpus": load.gpus,
            "accumulate": settings.accumulate,
            "micro_batch": size,
            "precision": settings.precision,
            "checkpointing": settings.gradient_checkpointing,
            **{key: step[key] for key in ("sequence", "image_tokens", "losses", "logits", "without_gradient")},
        },
        "training": training,
        "extraction": extraction_pass(shaped, load) if shaped.teacher is not None else None,
        "assumptions": assumptions,
    }
