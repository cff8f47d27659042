"""Which targets move the student at all: the gradient that each gives, at logged steps."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from laavit.engine.settings import TrainSettings
from laavit.structures import StudentOutput

PREFIX = "target_grad/"
#: logged steps in a row without a gradient before a target is called dead
PATIENCE = 3

logger = logging.getLogger("laavit.engine")


def leaves_of(output: StudentOutput) -> tuple[StudentOutput, list[Tensor]]:
    """The same output cut off from its graph, and those of its tensors through which the student can be moved."""
    leaves: list[Tensor] = []

    def cut(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        leaf = tensor.detach()
        if tensor.requires_grad:
            leaves.append(leaf.requires_grad_())
        return leaf

    emitted = output.emitted and (cut(output.emitted[0]), output.emitted[1])
    rows = {layer: cut(row) for layer, row in output.rows.items()}
    found = replace(
        output, hidden=cut(output.hidden), logits=cut(output.logits), rows=rows, embeddings=cut(output.embeddings)
    )
    return replace(found, emitted=emitted), leaves


def target_gradient(target: Any, output: StudentOutput, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """The norm of what a target's weighted loss asks of the student's states and rows, and whether it can ask at all.

    The target is worked out once more, on tensors cut off from the student: the step's own graph, its bits and what
    strategies hang on it are not touched, and no gradient of a parameter is made.
    """
    device = output.hidden.device
    own, leaves = leaves_of(output)
    if not leaves:
        return torch.zeros((), device=device), False
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        loss = target.forward(own, *args, **kwargs)
    # bf16 autocast keeps its casts of parameters for the real pass: their part of the graph must stay
    found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) if loss.requires_grad else ()
    norms = [gradient.float().norm() for gradient in found if gradient is not None]
    if not norms:
        return torch.zeros((), device=device), False
    return target.weight * torch.stack(norms).norm(), True


class TargetGradientHook(Hook):
    """Logs ``target_grad/<name>``; says, once a target, when it gives no gradient for ``PATIENCE`` logged steps.

    Args:
        settings: which steps are logged.
    """

    priority = "NORMAL"  # before LogHook

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.silent: Counter[str] = Counter()
        self.told: set[str] = set()
        self.handles: list[Any] = []
        self.norms: dict[str, Tensor] = {}
        self.connected: dict[str, bool] = {}

    def before_train(self, runner: Any) -> None:
        """Find the targets."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.targets: Mapping[str, Any] = getattr(model, "named_targets", {})

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """On a step that will be logged, listen to what the targets are given."""
        self.norms, self.connected = {}, {}
        if self.settings.logs(batch_idx + 1):
            self.handles = [
                target.register_forward_pre_hook(self._listener(name), with_kwargs=True)
                for name, target in self.targets.items()
            ]

    def _listener(self, name: str) -> Any:
        def listen(target: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if not (torch.is_grad_enabled() and target.training):
                return
            norm, connected = target_gradient(target, args[0], args[1:], kwargs)
            self.norms[name] = torch.maximum(norm, self.norms[name]) if name in self.norms else norm
            self.connected[name] = connected or self.connected.get(name, False)

        return listen

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Hand the norms to the log."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if outputs is not None:
            outputs.update({f"{PREFIX}{name}": norm for name, norm in self.norms.items()})

    def after_log(self, runner: Any, record: dict[str, Any]) -> None:
        """Count the steps without a gradient (in all processes, which the log's figures are means of)."""
        for name, target in self.targets.items():
            norm = record.get(f"{PREFIX}{name}")
            self.silent[name] = self.silent[name] + 1 if norm == 0 else 0
            if self.silent[name] >= PATIENCE and name not in self.told:
                self.told.add(name)
                logger.warning(
                    "step %d: the target '%s' is dead: it has given the student no gradient for %d logged steps; %s",
                    record["iter"], name, self.silent[name], self._cause(name, target, record.get(name)),
                )  # fmt: skip

    def _cause(self, name: str, target: Any, loss: float | None) -> str:
        if target.weight == 0:
            return f"its weight is 0 (targets.{name}.weight)"
        if not self.connected.get(name, True):
            return (
                "what it reads of the student takes no gradient: everything below is frozen (student.freeze), or a "
                "part of the model's own cuts the graph (re-entrant checkpointing, detach)"
            )
        if loss == 0:
            return (
                "its loss is 0: it is met exactly, or no sample of these batches has what it speaks of "
                "(latents, boxes, steps)"
            )
        return f"its loss ({loss if loss is None else f'{loss:.4g}'}) does not depend on the student's states or rows"

    def close(self, runner: Any) -> None:
        """Listen no longer, however the run ends."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
