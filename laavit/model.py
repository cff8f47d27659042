"""LaViT: a student with latents, a gate, and targets. The forward pass is one screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from mmengine.model import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from laavit.attention import AttentionContext, GatePath
from laavit.backbones.chat import IGNORED
from laavit.backbones.rows import row_positions
from laavit.data.aligned import header_of
from laavit.gates import PATHS, Gate
from laavit.registry import UserError
from laavit.structures import Batch, Role, StudentOutput
from laavit.targets.base import Target


def path_queries(roles: Tensor, role: Role) -> Tensor:
    """Who looks along a path, bool [B, S].

    For 'question' these are all prompt positions after the first image token that are no latents: chat markup there has
    seen the image too, and would otherwise carry it past a closed gate.
    """
    if role != Role.QUESTION:
        return roles == role
    after_image = (roles == Role.IMAGE).cumsum(1) > 0
    return after_image & ((roles == Role.QUESTION) | (roles == Role.OTHER))


def gate_paths(gate: Gate | None, step: int, roles: Tensor) -> tuple[GatePath, ...]:
    """A gate's paths at a step (Eq. 4): bias ln(gamma) from queries to image keys; none where the gate is open."""
    if gate is None or (bias := gate.bias(step)) == 0.0:
        return ()
    pairs = [PATHS[name] for name in gate.paths]
    return tuple(GatePath(path_queries(roles, queries), roles == keys, bias) for queries, keys in pairs)


class LaViT(BaseModel):
    """L = L_ntp + sum(weight * target) (Eq. 9), under the gate's bias at the current step.

    Args:
        student: an HFStudent (or any module with ``forward(batch, context) -> hidden``, ``backbone``).
        gate: None is an open gate.
        targets: by the name under which each is logged.
    """

    def __init__(self, student: Any, gate: Gate | None = None, targets: Mapping[str, Target] | None = None) -> None:
        super().__init__()
        self.student, self.gate, self.step = student, gate, 0
        self.targets = nn.ModuleDict(targets or {})

    @property
    def named_targets(self) -> Mapping[str, Target]:
        """The targets by the name under which each is logged."""
        return cast("Mapping[str, Target]", self.targets)

    def set_step(self, step: int) -> None:
        """The optimiser step that the gate's schedule reads."""
        self.step = step

    def context(self, batch: Batch) -> tuple[AttentionContext | None, dict[str, Tensor]]:
        """What this forward asks of the attention: the gate's paths (training only) and the targets' rows."""
        kinds = dict.fromkeys(kind for target in self.named_targets.values() for kind in target.rows)
        positions = {kind: row_positions(batch, kind) for kind in kinds}
        paths = gate_paths(self.gate, self.step, batch.roles) if self.training else ()
        if not paths and not positions:
            return None, positions
        depth = self.student.backbone.depth
        wanted = [target.layers for target in self.named_targets.values() if target.rows]
        layers = None if None in wanted else {layer for some in wanted for layer in some or ()}
        rows = torch.cat(list(positions.values()), 1) if positions else None
        return AttentionContext(paths=paths, rows=rows, layers=layers, num_layers=depth), positions

    def observe(self, batch: Batch) -> StudentOutput:
        """One pass of the student: states, logits at the labels alone, recorded rows."""
        context, positions = self.context(batch)
        hidden = self.student(batch, context)
        asked = batch.labels != IGNORED
        logits = self.student.backbone.logits(hidden[asked])
        rows = context.recorded if context is not None else {}
        return StudentOutput(hidden, logits, batch.labels[asked], rows, positions)

    def forward(self, batch: Batch, mode: str = "loss") -> dict[str, Tensor]:  # type: ignore[override]
        """The losses of a batch: ``loss`` is the total, every other key a logged figure of its own name."""
        if mode != "loss":
            raise ValueError(f"LaViT trains with mode='loss', got '{mode}'; use generate or observe otherwise")
        batch = batch.to(self.student.backbone.device)
        output = self.observe(batch)
        kind = torch.promote_types(output.logits.dtype, torch.float32)
        ntp = F.cross_entropy(output.logits.to(kind), output.labels)
        total, logged = ntp, {"ntp": ntp}
        for name, target in self.named_targets.items():
            logged[name] = target(output, batch.roles, batch.targets[name])
            total = total + target.weight * logged[name]
        if self.gate is not None:
            logged["gamma"] = ntp.new_tensor(self.gate.gamma(self.step) if self.training else 1.0)
        return {"loss": total, **{name: value.detach() for name, value in logged.items()}}

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def save_checkpoint(self, folder: Path) -> None:
        """Write the student as a Hugging Face folder and the targets' heads beside it."""
        self.student.backbone.save(folder)
        heads = {name: t.detach().cpu().contiguous() for name, t in self.targets.state_dict().items()}
        save_file(heads, folder / "heads.safetensors")

    def load_checkpoint(self, folder: Path) -> None:
        """Read what ``save_checkpoint`` wrote, into a model built by the same recipe.

        Raises:
            UserError: a file is missing or holds other parameters than this model.
        """
        if not (folder / "heads.safetensors").is_file():
            raise UserError(f"the checkpoint {folder} is not complete: heads.safetensors is missing")
        own = self.student.model
        loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=next(own.parameters()).dtype)
        heads = load_file(folder / "heads.safetensors")
        for module, state in ((own, loaded.state_dict()), (self.targets, heads)):
            shapes, given = ({name: t.shape for name, t in s.items()} for s in (module.state_dict(), state))
            if shapes != given:
                names = sorted(name for name in shapes | given if shapes.get(name) != given.get(name))
                raise UserError(f"the checkpoint {folder} holds another model: {', '.join(names[:3])} differ")
            module.load_state_dict(state)


def build_model(recipe: Any, header: Mapping[str, Any]) -> LaViT:
    """The model of a recipe: student with latents, gate, targets with their sizes.

    Args:
        recipe: a ``laavit.recipe.Recipe``. header: of the trace store (a target's own store goes before it), ``{}``
            where no target needs one.
    """
    generator = torch.Generator().manual_seed(recipe.config["seed"])
    with torch.random.fork_rng():
        torch.manual_seed(recipe.config["seed"])
        student = recipe.build("student")
        latents = recipe.build("latents") if recipe.has("latents") else None
        student.setup(latents, generator)
        targets = build_targets(recipe, student, header)
    return LaViT(student, recipe.build("gate") if recipe.has("gate") else None, targets)


def build_targets(recipe: Any, student: Any, header: Mapping[str, Any]) -> dict[str, Target]:
    """The recipe's targets, with the sizes of a student that is set up and of the traces' header."""
    targets = {name: recipe.build(f"targets.{name}") for name in recipe.config["targets"]}
    for name, target in targets.items():
        try:
            own = header if target.store is None else header_of(target.store)
            target.setup(student.backbone.width, student.backbone.depth, student.latents, own)
        except UserError as error:
            raise UserError(f"targets.{name}: {error}") from None
    return targets
