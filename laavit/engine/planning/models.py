"""A recipe's models as shapes: student with latents, gate and targets, and the teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from laavit.backbones.base import Backbone
from laavit.backbones.loading import bound_pixels
from laavit.engine.examples import Load, example
from laavit.engine.flops import shape_copy
from laavit.engine.shapes import Blueprint, as_shapes, blueprint, fake_mode, shaped_backbone
from laavit.latents import NO_LATENTS
from laavit.model import LaViT, build_gate, build_targets, check_layers
from laavit.recipe import Recipe
from laavit.registry import UserError
from laavit.structures import Encoded
from laavit.students.composed import ComposedStudent
from laavit.students.hf import HFStudent
from laavit.students.lora import LoraSettings
from laavit.targets import ConceptTarget


@dataclass
class Shaped:
    """A recipe's student and teacher as shapes."""

    recipe: Recipe
    mode: FakeTensorMode
    model: LaViT
    plan: Blueprint
    teacher: Backbone | None
    teacher_plan: Blueprint | None

    def example(self, key: str, load: Load) -> Encoded:
        """One sample as the ``student`` or the ``teacher`` reads it."""
        given, prompt = self.recipe.arguments(key), self.recipe.build("prompt")
        pixels = given.get("min_pixels"), given.get("max_pixels")
        if key == "student":
            student = self.model.student
            return example(student.backbone, self.plan, self.mode, student.layout, load, pixels, prompt)
        assert self.teacher is not None and self.teacher_plan is not None, "called where the recipe has a teacher"
        return example(self.teacher, self.teacher_plan, self.mode, NO_LATENTS, load, pixels, prompt)


def blueprints(recipe: Recipe, mode: FakeTensorMode) -> dict[str, Blueprint]:
    """Blueprints of the recipe's student and teacher, checked before anything is built.

    Raises:
        UserError: a part is no Hugging Face model, or its configuration or processor is not there.
    """
    found = {}
    for key, kinds in (("student", ("HFStudent", "ComposedStudent")), ("teacher", ("HFTeacher",))):
        if key == "teacher" and not recipe.has(key):
            continue
        kind = (recipe.config[key] or {}).get("type")
        if kind not in kinds:
            raise UserError(f"{key}: plan works out {' and '.join(kinds)} alone, got {kind}")
        if kind == "ComposedStudent":
            found[key] = composed(recipe, mode)
            continue
        given = recipe.arguments(key)
        found[key] = blueprint(given["path"])
        if not found[key].by_area:  # as its model is read; of areas the bounds themselves are counted with
            bound_pixels(found[key].processor.image_processor, given.get("min_pixels"), given.get("max_pixels"))
    return found


def composed(recipe: Recipe, mode: FakeTensorMode) -> Blueprint:
    """The blueprint of a student put together of parts, which are read for it: how they fit is known only then.

    Raises:
        UserError: a part is not on this machine, or does not fit the other.
    """
    arguments = recipe.arguments("student") | {"lora": None}
    backbone = ComposedStudent(**arguments).backbone
    model = shape_copy(backbone.model, mode)
    source = f"{arguments['tower']} + {arguments['language']}"
    return Blueprint(backbone.model.config, source, len(backbone.tokenizer), 0, 0, backbone.processor, model)


def shape_models(recipe: Recipe) -> Shaped:
    """Build student (with latents, gate, targets) and teacher of a recipe without weights.

    Raises:
        UserError: a part is no Hugging Face model, a configuration is not known, or the parts do not fit one another.
    """
    mode, gate = fake_mode(), build_gate(recipe)
    plans = blueprints(recipe, mode)
    given = recipe.arguments("student")
    latents = recipe.build("latents") if recipe.has("latents") else None
    plan = plans["student"]
    backbone = shaped_backbone(
        plan, given["dtype"], given["attention"], mode, latents.layout.most + 1 if latents else 0
    )
    lora = LoraSettings(**given["lora"]) if given["lora"] is not None else None
    student = HFStudent.of(backbone, given.get("path", plan.source), given["freeze"], lora)
    student.setup(latents, torch.Generator().manual_seed(0))
    as_shapes(student.model, mode)
    check_layers(gate, student)
    teacher, teacher_plan, header = None, None, {}
    if recipe.has("teacher"):
        teacher_plan = plans["teacher"]
        teacher = shaped_backbone(teacher_plan, recipe.arguments("teacher")["dtype"], "laavit", mode)
        teacher.model.eval().requires_grad_(False)
        if teacher_plan.processor is not None:
            teacher.family.set_images(recipe.arguments("teacher")["images"] or {})
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
