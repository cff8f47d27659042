"""What a recipe needs before anything is loaded: parameters by part, memory by part, FLOPs, time, storage.

Student and teacher are built from their configurations as shapes (``laavit.engine.shapes``); then the recipe's own
training step and extraction pass run on those shapes, so that latents, heads and gate are shown to fit, and memory and
FLOPs are counted by operation, under the recipe's precision, with and without checkpointing, instead of by a formula.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from laavit.engine.examples import Load
from laavit.engine.planning.levers import levers
from laavit.engine.planning.machines import Machine
from laavit.engine.planning.models import Shaped, shape_models
from laavit.engine.planning.passes import Step, Vision, about_images, extraction_pass, training_step, vision_pass
from laavit.engine.planning.speed import step_seconds, storage
from laavit.engine.planning.spread import computing_in, own_way, shared_memory, ways, whole_memory
from laavit.engine.settings import TrainSettings
from laavit.engine.shapes import bytes_of, parameters_by_part
from laavit.recipe import Recipe
from laavit.registry import UserError
from laavit.structures import Encoded
from laavit.students.freezing import parameters_of

__all__ = ["ASSUMPTIONS", "Load", "levers", "make_plan", "shape_models", "timed"]

ASSUMPTIONS = (
    "every sample has one image, the largest that its processor makes (or --image)",
    "attention keeps what flash or memory-efficient SDPA keeps, never an S x S map",
    "weights, gradients and both AdamW moments are float32 where the student's dtype is (these are the master weights)",
    "the allocator's fragmentation and the CUDA context (about 1 GB) come on top",
)

#: share of a GPU's memory that a proposed way leaves to fragmentation and the CUDA context
RESERVE = 0.1


@dataclass
class Passes:
    """The passes of a plan, each run when it is first asked for.

    Args:
        items: the samples of a micro-batch.
    """

    shaped: Shaped
    load: Load
    items: list[Encoded]
    vision: Vision

    def __post_init__(self) -> None:
        self.settings: TrainSettings = self.shaped.recipe.build("train")
        #: images of a micro-batch that pass the tower
        self.images = self._images(self.items, self.settings)

    def _images(self, items: list[Encoded], settings: TrainSettings) -> int:
        if self.shaped.recipe.build("traces").vision_cache is not None:
            return 0
        return len({item.sample.images for item in items}) if settings.shared_prefix else len(items)

    def step(self, checkpointing: bool, precision: Literal["fp32", "bf16"] | None = None) -> Step:
        """A step, and its images' way through the tower before it. precision: in place of the recipe's."""
        settings = self.settings if precision is None else replace(self.settings, precision=precision)
        return self._run(checkpointing, self.items, settings)

    def _run(self, checkpointing: bool, items: list[Encoded], settings: TrainSettings) -> Step:
        step = training_step(self.shaped, items, self.vision.features, self.load, checkpointing, settings)
        images = self._images(items, settings)
        held, seen = self.vision.held * images, self.vision.peak * images
        gradients = step.gradients + self.vision.gradients * bool(images)
        after = gradients if held else 0  # the way back through a tower that learns comes last
        return replace(
            step,
            peak=max(step.peak + held, seen + after),
            activations=max(step.activations + held, seen),
            gradients=gradients,
        )

    def with_shared_prefix(self, checkpointing: bool) -> Step | None:
        """A step that reads shared beginnings once; None where it does already, or the samples share none."""
        if self.settings.shared_prefix or self.load.questions == 1 or self.settings.packing == "pack":
            return None
        images = max(len(self.items) // self.load.questions, 1)
        items = about_images(self.items[0], images, min(self.load.questions, len(self.items)))
        return self._run(checkpointing, items, replace(self.settings, shared_prefix=True))


def micro_batch(settings: TrainSettings, load: Load) -> int:
    """Samples that a process reads at once.

    Raises:
        UserError: the batch does not divide among processes and micro-batches.
    """
    if settings.batch_size % (load.gpus * settings.accumulate):
        raise UserError(
            f"train.batch_size: {settings.batch_size} does not divide by {load.gpus} GPUs x train.accumulate = "
            f"{settings.accumulate} micro-batches"
        )
    return settings.batch_size // (load.gpus * settings.accumulate)


def passes_of(shaped: Shaped, size: int, load: Load) -> Passes:
    """The passes of micro-batches of ``size`` samples (of so many groups, where the recipe groups them)."""
    settings: TrainSettings = shaped.recipe.build("train")
    item = shaped.example("student", load)
    vision = vision_pass(shaped.model.student.backbone, item, settings.precision)
    items = about_images(item, size, load.questions if settings.grouped else 1)
    return Passes(shaped, load, items, vision)


def all_ways(passes: Passes) -> tuple[list[dict[str, Any]], int]:
    """Memory and FLOPs of each way to run the recipe; and which of them is its own."""
    model, settings, gpus = passes.shaped.model, passes.settings, passes.load.gpus
    own = own_way(passes.shaped.recipe, gpus)
    wanted = [own if replace(own, reduce_every=False) == way else way for way in ways(gpus)]
    wanted += [] if own in wanted else [own]
    steps = {(False, way.checkpointing): None for way in wanted}
    steps |= {(True, way.checkpointing): None for way in wanted if way.strategy == "fsdp2"}
    found: dict[tuple[bool, bool], Step] = {}
    bf16 = settings.precision == "bf16"
    for shares, checkpointing in steps:
        if not (shares and bf16):
            found[shares, checkpointing] = found.get((False, checkpointing)) or passes.step(checkpointing)
    if any(shares for shares, _ in steps) and bf16:  # fsdp2 gathers weights in bf16, and there is no autocast
        with computing_in(model, passes.shaped.mode, torch.bfloat16):
            for shares, checkpointing in steps:
                if shares:
                    found[shares, checkpointing] = passes.step(checkpointing, "fp32")
    rows = []
    for way in wanted:
        step = found[way.strategy == "fsdp2", way.checkpointing]
        if way.strategy == "fsdp2":
            memory = shared_memory(model, step, gpus, way, settings.precision, settings.accumulate)
        else:
            memory = whole_memory(model, step, gpus)
        rows.append({"name": way.name, **vars(way), "settings": way.settings, "memory": memory, "step": step})
    return rows, wanted.index(own)


def flops_of(passes: Passes, row: dict[str, Any], plain: Step) -> dict[str, int]:
    """FLOPs of one process's optimizer step: forward, backward, and what checkpointing computes again."""
    vision, times = passes.vision, passes.settings.accumulate
    again = row["step"].backward - plain.backward
    return {
        "forward": times * (plain.forward + vision.forward * passes.images),
        "backward": times * (plain.backward + vision.backward * passes.images),
        "recompute": times * max(again, 0),
    }


def timed(found: dict[str, Any], machine: Machine | None, share: float, memory: float | None = None) -> dict[str, Any]:
    """A plan with what depends on the machine: whether each way fits, how fast it is, and which one is proposed.

    Args:
        share: of the machine's peak at which everything is computed, what is computed again included: an assumption.
        memory: of one GPU in bytes, in place of the machine's.
    """
    room = memory if memory is not None else machine.memory if machine is not None else None
    steps, gpus = found["run"]["steps"], found["step"]["gpus"]
    for row in found["ways"]:
        row["fits"] = None if room is None else row["memory"]["peak"] <= room
        row["spare"] = None if room is None else int(room - row["memory"]["peak"])
        if machine is not None:
            updated = found["total"]["trainable"] / (gpus if row["strategy"] == "fsdp2" else 1)
            seconds = step_seconds(sum(row["flops"].values()), updated, machine, share)
            model_flops = row["flops"]["forward"] + row["flops"]["backward"]
            row |= {"step_seconds": None, "hours": None, "mfu": None}
            if not row["offload"]:  # then the way to the host decides, of which nothing is known here
                row |= {"step_seconds": seconds, "hours": seconds * steps / 3600}
                row["mfu"] = model_flops / seconds / machine.flops
    found["assumed_share"], found["memory"] = share if machine is not None else None, room
    found["proposed"] = _proposed(found["ways"]) if room is not None else None
    return found


def _proposed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The way that fits and computes least; of equal ones the first, which is the simplest."""
    fitting = [row for row in rows if row["fits"] and row["spare"] >= RESERVE * (row["spare"] + row["memory"]["peak"])]
    if not fitting:
        least = min(rows, key=lambda row: row["memory"]["peak"])
        why = f"none leaves a tenth of the memory free; '{least['name']}' needs the least"
        return {"name": None, "why": why, "settings": ""}
    row = min(fitting, key=lambda row: (row["offload"], row["flops"]["recompute"] > 0))
    tight = [other["name"] for other in rows[: rows.index(row)] if other not in fitting]
    why = "the simplest that leaves a tenth of the memory for what is not counted and computes least again"
    why += f"; too tight: {', '.join(tight)}" if tight else ""
    return {"name": row["name"], "why": why, "settings": row["settings"]}


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
    """Everything ``laavit plan`` tells of a recipe, as plain data; sizes are in bytes.

    Raises:
        UserError: see ``shape_models``; or the batch does not divide among processes and micro-batches.
    """
    settings: TrainSettings = recipe.build("train")
    size = micro_batch(settings, load)
    shaped = shape_models(recipe)
    model, student, given = shaped.model, shaped.model.student, recipe.arguments("student")
    passes = passes_of(shaped, size, load)
    rows, own = all_ways(passes)
    plain = next(row["step"] for row in rows if not row["checkpointing"] and row["strategy"] != "fsdp2")
    for row in rows:
        row["flops"] = flops_of(passes, row, plain)
    shared = passes.with_shared_prefix(settings.gradient_checkpointing)
    own_step = rows[own]["step"]
    for row in rows:
        del row["step"]
    item, counts = passes.items[0], parameters_by_part(model)
    labels = sum(int((each.labels >= 0).sum()) for each in passes.items)
    head: Any = student.model.get_output_embeddings()
    extraction = extraction_pass(shaped, load) if shaped.teacher is not None else None
    trainable = bytes_of(p for p in model.parameters() if p.requires_grad)
    learning = [p for p in parameters_of("vision", student.backbone) if p.requires_grad]
    through = passes.vision.reached if passes.images else frozenset()
    named = dict(model.named_parameters())
    unreached = [name for name in own_step.unreached if id(named[name]) not in through]
    kept = bytes_of(model.parameters()) if student.adapters is None else trainable
    return {
        "recipe": recipe.config["title"],
        "student": {
            "path": student.path,
            "configuration": shaped.plan.source,
            "dtype": given["dtype"],
        },
        "teacher": recipe.arguments("teacher").get("path") if recipe.has("teacher") else None,
        "parameters": counts,
        "total": {kind: sum(part[kind] for part in counts.values()) for kind in ("all", "trainable")},
        "latents": {"count": student.latents, "embedding_rows": student.model.get_input_embeddings().weight.shape[0]},
        "gate": describe_gate(model.gate, settings.steps),
        "step": {
            "gpus": load.gpus,
            "accumulate": settings.accumulate,
            "micro_batch": len(passes.items),
            "precision": settings.precision,
            "checkpointing": settings.gradient_checkpointing,
            "sequence": len(item.input_ids),
            "image_tokens": sum(span.tile.cells for span in item.spans),
            "losses": list(own_step.losses),
            "logits": min(labels, settings.loss_rows or labels) * head.weight.shape[0] * 4,
            "without_gradient": unreached,
        },
        "ways": rows,
        "own": own,
        "accumulate": settings.accumulate,
        "trainable_bytes": trainable,
        "shared_prefix": max(own_step.activations - shared.activations, 0) if shared is not None else 0,
        "vision_learns": bool(learning),
        "vision_share": bytes_of(learning) / trainable if trainable else 0.0,
        "vision_held": passes.vision.held * passes.images,
        "extraction": extraction,
        "run": {
            "steps": settings.steps,
            **storage(kept, trainable, settings, extraction["trace"] if extraction is not None else None),
        },
        "assumptions": _assumptions(settings, load),
    }


def _assumptions(settings: TrainSettings, load: Load) -> list[str]:
    said = [f"{load.text} tokens of text and {load.answer} of answer a sample", *ASSUMPTIONS]
    if settings.grouped:
        about = "one sample" if load.questions == 1 else f"{load.questions} samples"
        said.append(f"train.grouped counts groups of samples; {about} a group (--questions)")
    for name, off in (("kernels", "none"), ("compile", False), ("loss_rows", 0)):
        if getattr(settings, name) != off:
            said.append(f"what train.{name} saves is not counted")
    return said
