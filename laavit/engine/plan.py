"""What a recipe needs before anything is loaded: parameters by part, memory by part, FLOPs, time, storage.

Student and teacher are built from their configurations as shapes (``laavit.engine.shapes``); then the recipe's own
training step and extraction pass run on those shapes, so that latents, heads and gate are shown to fit, and memory and
FLOPs are counted by operation, under the recipe's precision, with and without checkpointing, instead of by a formula.
"""

from __future__ import annotations

from typing import Any

import torch

from laavit.engine.examples import Load
from laavit.engine.planning.batches import Passes, check_batch, passes_of, units
from laavit.engine.planning.levers import levers
from laavit.engine.planning.machines import Machine
from laavit.engine.planning.models import shape_models
from laavit.engine.planning.passes import Step, extraction_pass
from laavit.engine.planning.speed import step_seconds, storage
from laavit.engine.planning.spread import Way, computing_in, own_way, shared_memory, ways, whole_memory
from laavit.engine.settings import TrainSettings
from laavit.engine.shapes import bytes_of, parameters_by_part
from laavit.recipe import Recipe
from laavit.students.freezing import parameters_of

__all__ = ["ASSUMPTIONS", "Load", "levers", "make_plan", "passes_of", "shape_models", "timed"]

ASSUMPTIONS = (
    "every sample has one image, the largest that its processor makes (or --image)",
    "attention keeps what flash or memory-efficient SDPA keeps, never an S x S map",
    "weights, gradients and both AdamW moments are float32 where the student's dtype is (these are the master weights)",
    "the allocator's fragmentation and the CUDA context (about 1 GB) come on top",
)

#: share of a GPU's memory that a proposed way leaves to fragmentation and the CUDA context
RESERVE = 0.1


def all_ways(passes: Passes, own: Way) -> list[dict[str, Any]]:
    """Memory and FLOPs of each way to run the recipe. own: its own."""
    model, settings, gpus = passes.shaped.model, passes.settings, passes.load.gpus
    wanted = ways(own, gpus)
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
        flops = flops_of(step, found[False, False], settings.accumulate)
        row = {"name": way.name, **vars(way), "shares": way.shares(gpus), "settings": way.settings}
        rows.append({**row, "memory": memory, "flops": flops, "step": step})
    return rows


def flops_of(step: Step, plain: Step, times: int) -> dict[str, int]:
    """FLOPs of one process's optimizer step: forward, backward, and what checkpointing computes again.

    Args:
        plain: the step without checkpointing. times: micro-batches.
    """
    again = max(step.backward - plain.backward, 0)
    return {"forward": times * plain.forward, "backward": times * plain.backward, "recompute": times * again}


def timed(found: dict[str, Any], machine: Machine | None, share: float, memory: float | None = None) -> dict[str, Any]:
    """A plan with what depends on the machine: whether each way fits, how fast it is, and which one is proposed.

    A machine's peak is that of bf16: what computes in fp32 gets no time.

    Args:
        share: of the machine's peak at which everything is computed, what is computed again included: an assumption.
        memory: of one GPU in bytes, in place of the machine's.
    """
    room = memory if memory is not None else machine.memory if machine is not None else None
    steps, fast = found["run"]["steps"], found["step"]["precision"] == "bf16"
    for row in found["ways"]:
        row["fits"] = None if room is None else row["memory"]["peak"] <= room
        row["spare"] = None if room is None else int(room - row["memory"]["peak"])
        if machine is not None and fast:
            updated = found["total"]["trainable"] / row["shares"]
            seconds = step_seconds(sum(row["flops"].values()), updated, machine, share)
            model_flops = row["flops"]["forward"] + row["flops"]["backward"]
            row |= {"step_seconds": None, "hours": None, "mfu": None}
            if not row["offload"]:  # then the way to the host decides, of which nothing is known here
                row |= {"step_seconds": seconds, "hours": seconds * steps / 3600}
                row["mfu"] = model_flops / seconds / machine.flops
    found["assumed_share"], found["memory"] = share if machine is not None and fast else None, room
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
        UserError: see ``shape_models``, ``own_way`` and ``units``.
    """
    settings: TrainSettings = recipe.build("train")
    check_batch(settings, load.gpus)
    own = own_way(recipe, load.gpus)
    shaped = shape_models(recipe)
    model, student = shaped.model, shaped.model.student
    passes = passes_of(shaped, None, load, (own if own.strategy == "fsdp2" else Way("fsdp2")).shares(load.gpus))
    rows = all_ways(passes, own)
    shared = passes.with_shared_prefix(settings.gradient_checkpointing)
    mine = next(number for number, row in enumerate(rows) if all(row[key] == value for key, value in vars(own).items()))
    own_step: Step = rows[mine]["step"]
    for row in rows:
        del row["step"]
    counts, vision = parameters_by_part(model), passes.vision(settings.gradient_checkpointing)
    trainable = bytes_of(p for p in model.parameters() if p.requires_grad)
    learning = [p for p in parameters_of("vision", student.backbone) if p.requires_grad]
    return {
        "recipe": recipe.config["title"],
        "student": {
            "path": student.path,
            "configuration": shaped.plan.source,
            "dtype": recipe.arguments("student")["dtype"],
        },
        "teacher": recipe.arguments("teacher").get("path") if recipe.has("teacher") else None,
        "parameters": counts,
        "total": {kind: sum(part[kind] for part in counts.values()) for kind in ("all", "trainable")},
        "latents": {"count": student.latents, "embedding_rows": student.model.get_input_embeddings().weight.shape[0]},
        "gate": describe_gate(model.gate, settings.steps),
        "step": described_step(passes, own_step),
        "ways": rows,
        "own": mine,
        "accumulate": settings.accumulate,
        "trainable_bytes": trainable,
        "shared_prefix": max(own_step.activations - shared.activations, 0) if shared is not None else 0,
        "vision_learns": bool(learning),
        "vision_share": bytes_of(learning) / trainable if trainable else 0.0,
        "vision_held": vision.held * passes.images,
        "assumptions": _assumptions(recipe, load, own),
        **described_run(passes, trainable),
    }


def described_step(passes: Passes, step: Step) -> dict[str, Any]:
    """What a step reads and works out; ``step``: of the recipe's own way."""
    settings, model, item = passes.settings, passes.shaped.model, passes.items[0]
    labels = sum(int((each.labels >= 0).sum()) for each in passes.items)
    head: Any = model.student.model.get_output_embeddings()
    vision = passes.vision(settings.gradient_checkpointing)
    through = vision.reached if passes.images else frozenset()
    named = dict(model.named_parameters())
    return {
        "gpus": passes.load.gpus,
        "accumulate": settings.accumulate,
        "micro_batch": len(passes.items),
        "units": units(settings, passes.load, item)[1],
        "precision": settings.precision,
        "checkpointing": settings.gradient_checkpointing,
        "sequence": len(item.input_ids),
        "image_tokens": sum(span.tile.cells for span in item.spans),
        "losses": list(step.losses),
        "logits": min(labels, settings.loss_rows or labels) * head.weight.shape[0] * 4,
        "without_gradient": [name for name in step.unreached if id(named[name]) not in through],
    }


def described_run(passes: Passes, trainable: int) -> dict[str, Any]:
    """The extraction that a run is fed by, and what it leaves on the disk. trainable: bytes of what learns."""
    shaped, settings, load = passes.shaped, passes.settings, passes.load
    extraction = extraction_pass(shaped, load) if shaped.teacher is not None else None
    steps, count = settings.steps, units(settings, load, passes.items[0])[0]
    samples = steps * count * (load.questions if settings.grouped else 1)
    kept = bytes_of(shaped.model.parameters()) if shaped.model.student.adapters is None else trainable
    features = None
    if shaped.recipe.build("traces").vision_cache is not None:  # in the dtype of the weights
        features = passes.vision(False).features.numel() * next(shaped.model.parameters()).itemsize * steps * count
    found = storage(kept, trainable, settings, samples, extraction["trace"] if extraction is not None else None)
    return {"extraction": extraction, "run": {"steps": steps, **found, "features": features}}


def _assumptions(recipe: Recipe, load: Load, own: Way) -> list[str]:
    settings: TrainSettings = recipe.build("train")
    said = [f"{load.text} tokens of text and {load.answer} of answer a sample", *ASSUMPTIONS]
    if settings.grouped:
        about = "one sample" if load.questions == 1 else f"{load.questions} samples"
        said.append(f"train.grouped counts groups of samples; {about} a group (--questions)")
    elif load.questions > 1:
        said.append("--questions counts in what train.shared_prefix would free alone, since train.grouped is off")
    for name, off in (("kernels", "none"), ("compile", False)):
        if getattr(settings, name) != off:
            said.append(f"what train.{name} saves is not counted")
    if settings.cache_vision:
        said.append("every image passes the tower (train.cache_vision saves that from the second time on)")
    if recipe.has("strategy") and recipe.config["strategy"]["type"] not in ("Single", "DDP", "FSDP2"):
        said.append(f"'{recipe.config['strategy']['type']}' holds the whole model in every process, as {own.strategy}")
    if recipe.has("teacher") and recipe.arguments("teacher").get("quantization") is not None:
        said.append("the teacher's weights have its dtype: what teacher.quantization saves is not counted")
    return said
