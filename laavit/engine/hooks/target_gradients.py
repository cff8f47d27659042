"""Which targets move the student at all: the gradient that each gives, at logged steps."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from laavit.engine.distributed import rank_and_world
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

    States and rows of a step lie in its micro-batches and processes. The whole step's loss is the sum of each one's
    times s / (A W) (:mod:`laavit.engine.normalisation`), and so the norm with respect to all of them is the root of the
    sum of (s / (A W))^2 times their squared norms: the same however a step is split.

    Args:
        settings: which steps are logged.
    """

    priority = "NORMAL"  # before LogHook

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.silent: Counter[str] = Counter()
        self.told: set[str] = set()
        self.handles: list[Any] = []
        #: of each target, the sum over this process's micro-batches of their squared norms
        self.squares: dict[str, Tensor] = {}
        self.shares: Mapping[str, Tensor] = {}
        self.connected: dict[str, bool] = {}

    def before_train(self, runner: Any) -> None:
        """Find the targets."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.targets: Mapping[str, Any] = getattr(model, "named_targets", {})

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """On a step that will be logged, listen to what the targets are given."""
        self.squares, self.connected = {}, {}
        if self.settings.logs(batch_idx + 1):
            self.handles = [
                target.register_forward_pre_hook(self._listener(name), with_kwargs=True)
                for name, target in self.targets.items()
            ]

    def before_micro_batch(self, runner: Any, data_batch: Any) -> None:
        """What each loss counts among those of the step's other micro-batches."""
        self.shares = data_batch.get("shares", {}) if isinstance(data_batch, dict) else {}

    def _listener(self, name: str) -> Any:
        def listen(target: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if not (torch.is_grad_enabled() and target.training):
                return
            norm, connected = target_gradient(target, args[0], args[1:], kwargs)
            part = norm.double() * self.shares.get(name, 1.0) / (self.settings.accumulate * rank_and_world()[1])
            self.squares[name] = self.squares.get(name, 0.0) + part.square()
            self.connected[name] = connected or self.connected.get(name, False)

        return listen

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Hand the squares to the log, which takes their mean over processes."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if outputs is not None:
            outputs.update({f"{PREFIX}{name}": square for name, square in self.squares.items()})

    def before_log(self, runner: Any, record: dict[str, Any]) -> None:
        """The norm over all processes."""
        for name in self.squares:
            mean = record[f"{PREFIX}{name}"]
            record[f"{PREFIX}{name}"] = None if mean is None else math.sqrt(mean * rank_and_world()[1])

    def after_log(self, runner: Any, record: dict[str, Any]) -> None:
        """Count the steps without a gradient (in all processes, which the log's figures are means of)."""
        for name, target in self.targets.items():
            if record.get(name) is None:  # not finite: that is the guard's to tell, and its gradient says nothing
                continue
            norm = record.get(f"{PREFIX}{name}")
            self.silent[name] = self.silent[name] + 1 if norm == 0 else 0
            if self.silent[name] >= PATIENCE and name not in self.told:
                self.told.add(name)
                logger.warning(
                    "step %d: the target '%s' is dead: it has given the student no gradient for %d logged steps; %s",
                    record["iter"], name, self.silent[name], self._cause(name, target, record[name]),
                )  # fmt: skip

    def _cause(self, name: str, target: Any, loss: float) -> str:
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
        return f"its loss ({loss:.4g}) does not depend on the student's states or rows"

    def close(self, runner: Any) -> None:
        """Listen no longer, however the run ends."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
