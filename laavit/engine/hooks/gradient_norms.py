"""Gradient norms by part of the model, at logged steps, whatever the strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm

from laavit.engine.settings import TrainSettings
from laavit.latents import latent_tokens
from laavit.students.freezing import parameters_of, tables

PREFIX = "grad_norm/"
#: parts of a student's backbone that have a norm of their own, each without those before it
PARTS = ("embeddings", "head", "projector", "vision", "decoder")


def whole(value: Tensor) -> Tensor:
    """A figure as a plain tensor; of a sharded one the sum over its shards (all processes call it)."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of plain and sharded gradients together: a plain scalar."""
    sharded = [each for each in gradients if isinstance(each, DTensor)]
    plain = [each for each in gradients if not isinstance(each, DTensor)]
    norms = [whole(get_total_norm(some)) for some in (plain, sharded) if some]
    return torch.stack(norms).norm()


def named_parts(model: Any) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by part: ``PARTS`` of a LaViT's student, 'targets', 'adapters'; else by their first name."""
    backbone = getattr(getattr(model, "student", None), "backbone", None)
    owned = {id(p): part for part in reversed(PARTS) for p in parameters_of(part, backbone)} if backbone else {}
    adapters = getattr(getattr(model, "student", None), "adapters", None)
    if adapters is not None:
        owned |= {id(p): "adapters" for p in adapters.parameters()}
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(owned.get(id(parameter), name.split(".")[0]), []).append(parameter)
    return found


class Rows:
    """The rows of the latents and their separator in a table [V, D] that every token has a row of."""

    def __init__(self, table: nn.Parameter, rows: Sequence[int]) -> None:
        self.table, self.rows = table, torch.tensor(rows, device=table.device)
        self.keep: Tensor | None = None
        if isinstance(table, DTensor):
            keep = torch.zeros(table.shape[0], 1, device=table.device).index_fill_(0, self.rows, 1)
            # Every process has the whole column: none is sent.
            keep = distribute_tensor(keep, table.device_mesh, table.placements, src_data_rank=None)
            self.keep = keep.to(table.device)  # with fsdp2's offload no longer the mesh's

    def norm(self) -> Tensor | None:
        """The norm of their gradient; None where the table has none."""
        gradient = self.table.grad
        if gradient is None:
            return None
        if self.keep is None:
            return gradient[self.rows.to(gradient.device)].norm()
        return whole(torch.linalg.vector_norm(gradient * self.keep))


def latent_rows(model: Any) -> list[Rows]:
    """The rows of a LaViT's latents in its tables; none without latents, or where adapters train them."""
    student: Any = getattr(model, "student", None)
    if not getattr(student, "latents", 0) or getattr(student, "adapters", None) is not None:
        return []
    ids = student.backbone.tokenizer.convert_tokens_to_ids(latent_tokens(student.latents))
    return [Rows(table, ids) for table in tables(student.backbone).values() if table.requires_grad]


class GradientNormHook(Hook):
    """Logs ``grad_norm/<part>`` before clipping, and ``grad_norm/new_rows`` of the latents' and the separator's rows.

    Args:
        settings: which steps are logged.
    """

    priority = "NORMAL"  # before LogHook

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.norms: dict[str, Tensor] = {}

    def before_train(self, runner: Any) -> None:
        """Sort the parameters, which are now those that the optimizer moves."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.parts: Mapping[str, list[nn.Parameter]] = named_parts(model)
        self.rows = latent_rows(model)

    def before_update(self, runner: Any) -> None:
        """Between the backward pass and clipping: work the norms out on the device, to be read by the log."""
        self.norms = {}
        if not self.settings.logs(runner.iter + 1):
            return
        for part, parameters in self.parts.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                self.norms[part] = norm_of(gradients)
        rows = [norm for each in self.rows if (norm := each.norm()) is not None]
        if rows:
            self.norms["new_rows"] = torch.stack(rows).norm()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Hand them to the log; a part without a gradient in this step has no figure."""
        if outputs is not None and self.settings.logs(batch_idx + 1):
            outputs.update({f"{PREFIX}{part}": self.norms.get(part, float("nan")) for part in self.names})
        self.norms = {}

    @property
    def names(self) -> list[str]:
        """The same in every process and step, since processes average what they log."""
        return [*self.parts, *(["new_rows"] if self.rows else [])]

    def close(self, runner: Any) -> None:
        """Let go of the parameters."""
        self.parts, self.rows = {}, []
