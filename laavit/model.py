"""LaViT: a student with latents, a gate, and targets. The forward pass is one screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from mmengine.model import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from laavit.attention import AttentionContext, GatePath
from laavit.backbones.chat import IGNORED
from laavit.backbones.embeddings import input_embeddings
from laavit.backbones.loading import below, check_shapes
from laavit.backbones.rows import ROW_KINDS, emits, row_positions
from laavit.cross_entropy import TokenLoss, next_token_loss
from laavit.data.aligned import header_of
from laavit.gates import PATHS, Gate
from laavit.registry import UserError
from laavit.structures import Batch, Role, StudentOutput
from laavit.targets.base import Target


def image_blocks(batch: Batch) -> Tensor:
    """Where images stand, from each image's first token to its last, bool [B, S].

    Row separators and tile markers between them are part of the image: from the second layer on they say what the
    tokens around them do, and would carry it past a closed gate. So do the registers before a grid.
    """
    blocks = torch.zeros(batch.roles.shape, dtype=torch.bool)
    for row, spans in zip(blocks, batch.spans, strict=True):
        for image in {span.tile.image for span in spans}:
            own = [span for span in spans if span.tile.image == image]
            row[min(span.start - span.lead for span in own) : max(span.end for span in own)] = True
    return blocks.to(batch.roles.device)


def path_queries(roles: Tensor, blocks: Tensor, role: Role) -> Tensor:
    """Who looks along a path, bool [B, S]; ``blocks`` as ``image_blocks`` gives them.

    For 'question' these are all prompt positions after the first image token that are neither latents nor within an
    image: chat markup there has seen the image too, and would otherwise carry it past a closed gate.
    """
    if role != Role.QUESTION:
        return roles == role
    after_image = blocks.cumsum(1) > 0
    return after_image & ~blocks & ((roles == Role.QUESTION) | (roles == Role.OTHER))


def gate_paths(gate: Gate | None, step: int, batch: Batch, depth: int) -> tuple[GatePath, ...]:
    """A gate's paths at a step (Eq. 4): bias ln(gamma) from queries to images; none where the gate is open.

    Args:
        depth: decoder layers, for a gate that acts on some of them.
    """
    if gate is None:
        return ()
    shut = [(part, bias) for part in gate.parts().values() if (bias := part.bias(step)) != 0.0]
    if not shut:
        return ()
    blocks = image_blocks(batch)
    return tuple(
        GatePath(path_queries(batch.roles, blocks, PATHS[name]), blocks, bias, part.layers_of(depth))
        for part, bias in shut
        for name in part.paths
    )


class LaViT(BaseModel):
    """L = L_ntp + sum(weight * target) (Eq. 9), under the gate's bias at the current step.

    Where the student writes its latents itself, their cross-entropy joins as a term of its own: L_ntp stays the mean
    over the answer, whatever the number of latents.

    Args:
        student: an HFStudent (or any module with ``forward(batch, context) -> hidden``, ``backbone``, ``layout``,
            ``save`` and ``load``).
        gate: None is an open gate.
        targets: by the name under which each is logged.
    """

    def __init__(self, student: Any, gate: Gate | None = None, targets: Mapping[str, Target] | None = None) -> None:
        super().__init__()
        self.student, self.gate, self.step = student, gate, 0
        self.targets = nn.ModuleDict(targets or {})
        #: None works the loss out of all logits at once; another one reads the states, and no target the logits then
        self.token_loss: TokenLoss | None = None

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
        depth = self.student.backbone.depth
        paths = gate_paths(self.gate, self.step, batch, depth) if self.training else ()
        if not paths and not positions:
            return None, positions
        wanted = [target.layers for target in self.named_targets.values() if target.rows]
        layers = None if None in wanted else {layer for some in wanted for layer in some or ()}
        rows = torch.cat(list(positions.values()), 1) if positions else None
        return AttentionContext(paths=paths, rows=rows, layers=layers, num_layers=depth), positions

    def observe(self, batch: Batch) -> StudentOutput:
        """One pass of the student: states, logits where labels are, recorded rows, what targets ask for beside."""
        context, positions = self.context(batch)
        backbone, looking = self.student.backbone, any(t.needs_embeddings for t in self.named_targets.values())
        with input_embeddings(backbone.family.decoder(backbone.model) if looking else None) as seen:
            hidden = self.student(batch, context)
        answers, written = self.labelled(batch)
        whole, emitted = self.token_loss is None, None
        logits = backbone.logits(hidden[answers]) if whole else hidden.new_empty(0)
        if written is not None:
            emitted = backbone.logits(hidden[written]) if whole else hidden.new_empty(0), batch.labels[written]
        rows = context.recorded if context is not None else {}
        # The first pass holds the images, whatever passes latents add.
        looked = seen[0] if seen else None
        if looked is not None and batch.shared is not None:
            looked = looked[batch.shared.owners]
        return StudentOutput(hidden, logits, batch.labels[answers], rows, positions, looked, emitted)

    def labelled(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Positions that predict answers, bool [B, S], and those that predict latents which the student writes."""
        written = (batch.labels != IGNORED) & emits(batch.roles) if self.student.layout.emitted else None
        return ROW_KINDS["predicting"](batch), written

    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """Over how many tokens or samples each loss of a batch is a mean, by its name."""
        answers, written = self.labelled(batch)
        found: dict[str, int | Tensor] = {"ntp": answers.sum()}
        if written is not None:
            found["emit"] = written.sum()
        return found | {n: t.count(batch.roles, batch.targets[n]) for n, t in self.named_targets.items()}

    def forward(  # type: ignore[override]
        self, batch: Batch, mode: str = "loss", shares: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The losses of a batch: ``loss`` is the total, every other key a logged figure of its own name.

        Args:
            shares: what each loss counts among those of its step's other micro-batches, by name; None is 1.
        """
        if mode != "loss":
            raise ValueError(f"LaViT trains with mode='loss', got '{mode}'; use generate or observe otherwise")
        batch = batch.to(self.student.backbone.device)
        output = self.observe(batch)

        def shared(name: str, mean: Tensor) -> Tensor:
            return mean if shares is None else mean * shares[name].to(mean)

        def cross_entropy(asked: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
            if self.token_loss is None:
                return next_token_loss(logits, labels)
            head = self.student.backbone.model.get_output_embeddings()
            return self.token_loss(output.hidden[asked], labels, head)

        answers, written = self.labelled(batch)
        ntp = shared("ntp", cross_entropy(answers, output.logits, output.labels))
        total, logged = ntp, {"ntp": ntp}
        if output.emitted is not None and written is not None:
            logged["emit"] = shared("emit", cross_entropy(written, *output.emitted))
            total = total + self.student.layout.emit_weight * logged["emit"]
        for name, target in self.named_targets.items():
            logged[name] = shared(name, target(output, batch.roles, batch.targets[name]))
            total = total + target.weight * logged[name]
        for name, part in self.gate.parts().items() if self.gate is not None else ():
            logged[name] = ntp.new_full((), part.gamma(self.step) if self.training else 1.0)  # no copy to a GPU
        return {"loss": total, **{name: value.detach() for name, value in logged.items()}}

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def save_checkpoint(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the student (a Hugging Face folder, or adapters), and the targets' heads beside it.

        Args:
            state: this model's ``state_dict`` of another moment, or put together from several processes; its own where
                it is left out.
        """
        self.student.save(folder, None if state is None else below(state, "student."))
        heads = self.targets.state_dict() if state is None else below(state, "targets.")
        save_file({name: t.detach().cpu().contiguous() for name, t in heads.items()}, folder / "heads.safetensors")

    def save_processor(self, folder: Path) -> None:
        """Write what belongs to a checkpoint beside tensors: processor, tokens, configuration."""
        self.student.save_processor(folder)

    def saved_bytes(self) -> int:
        """About what the weights of a checkpoint take on the disk."""
        heads = sum(tensor.numel() * tensor.element_size() for tensor in self.targets.state_dict().values())
        return heads + int(self.student.saved_bytes())

    def load_checkpoint(self, folder: Path) -> None:
        """Read what ``save_checkpoint`` wrote, into a model built by the same recipe.

        Raises:
            UserError: a file is missing or holds other parameters than this model.
        """
        if not (folder / "heads.safetensors").is_file():
            raise UserError(f"the checkpoint {folder} is not complete: heads.safetensors is missing")
        heads = load_file(folder / "heads.safetensors")
        check_shapes(folder, self.targets.state_dict(), heads)
        self.student.load(folder)
        self.targets.load_state_dict(heads)


def build_model(recipe: Any, header: Mapping[str, Any]) -> LaViT:
    """The model of a recipe: student with latents, gate, targets with their sizes.

    Args:
        recipe: a ``laavit.recipe.Recipe``. header: of the trace store (a target's own store goes before it), ``{}``
            where no target needs one.
    """
    gate = build_gate(recipe)  # before any weights are read: what is wrong with it is said at once
    generator = torch.Generator().manual_seed(recipe.config["seed"])
    with torch.random.fork_rng():
        torch.manual_seed(recipe.config["seed"])
        student = recipe.build("student")
        latents = recipe.build("latents") if recipe.has("latents") else None
        student.setup(latents, generator)
        check_layers(gate, student)
        targets = build_targets(recipe, student, header)
    return LaViT(student, gate, targets)


def build_gate(recipe: Any) -> Gate | None:
    """The recipe's gate, told how many steps the run has; None where the recipe has none."""
    if not recipe.has("gate"):
        return None
    gate = recipe.build("gate")
    gate.set_run(recipe.build("train").steps)
    return gate


def check_layers(gate: Gate | None, student: Any) -> None:
    """Refuse a gate on layers that a student does not have.

    Raises:
        UserError: naming the recipe's key.
    """
    try:
        for part in gate.parts().values() if gate is not None else ():
            part.layers_of(student.backbone.depth)
    except UserError as error:
        raise UserError(f"gate.{error}") from None


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
