"""AdamW behind mmengine's OptimWrapper: accumulation counted in steps, autocast on any device, a guard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from laavit.engine.settings import TrainingStopped, TrainSettings
from laavit.registry import UserError

NamedParameters = list[tuple[str, nn.Parameter]]


def unique_parameters(named: Iterable[tuple[str, nn.Parameter]]) -> NamedParameters:
    """Trainable parameters under their first name, tied ones once.

    Raises:
        UserError: there are none, or they are held in 16 bits (an update of 5e-6 would be rounded away).
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in named:
        found.setdefault(id(parameter), (name, parameter))
    for name, parameter in found.values():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise UserError(
                f"the trainable parameter '{name}' is {str(parameter.dtype)[6:]}: load the student in "
                "float32 and set train.precision='bf16', which computes in bf16 and keeps float32 weights"
            )
    if not found:
        raise UserError(
            "the model has no trainable parameters: everything in the recipe's student and targets is frozen"
        )
    return list(found.values())


def build_adamw(named: NamedParameters, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over named parameters; vectors (norms, biases) are not decayed, nor tables of which a few rows learn."""

    def decays(parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not getattr(parameter, "few_rows", False)

    groups = [
        {"params": params, "weight_decay": settings.weight_decay if decayed else 0.0}
        for decayed in (True, False)
        if (params := [p for _, p in named if decays(p) is decayed])
    ]
    # Fused: one call for all parameters, on CPU too, where the default loops over them in Python.
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


class StepOptimWrapper(OptimWrapper):
    """One optimizer step over ``accumulate`` micro-batches.

    What differs from mmengine's: counts are given in optimizer steps; bf16 autocast works on the CPU as well (its
    AmpOptimWrapper refuses); the gradient norm stays a tensor (one host sync a step, in the guard); ``guard(loss,
    norm)`` is called before the weights change, says whether they may, and may raise.

    Args:
        optimizer: what steps.
        accumulate: micro-batches a step; the gradient is the mean of theirs.
        clip_grad: largest norm of the gradient, 0 for no clipping.
        precision: 'fp32' or 'bf16'.
        device: where autocast applies.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int = 1,
        clip_grad: float = 0.0,
        precision: str = "fp32",
        device: torch.device | None = None,
    ) -> None:
        super().__init__(optimizer, accumulative_counts=accumulate)
        self.max_norm = clip_grad
        self.precision = precision
        self.device = device or torch.device("cpu")
        self.guard: Callable[[Tensor, Tensor], bool] | None = None
        self.grad_norm: Tensor | None = None
        self._losses: list[Tensor] = []

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """mmengine's Runner gives its iterations, which are optimizer steps here: count their micro-batches."""
        factor = self._accumulative_counts
        super().initialize_count_status(model, init_counts * factor, max_counts * factor)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """No gradient exchange between micro-batches, and autocast where bf16 is asked for."""
        if isinstance(model, FSDPModule):  # it knows no ``no_sync``; the backward pass looks at what is set here
            model.set_requires_gradient_sync(self.should_sync() or bool(getattr(model, "reduce_every", False)))
        with super().optim_context(model):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                yield

    def backward(self, loss: Tensor, **kwargs: object) -> None:
        """Backward of one micro-batch, remembering its (scaled) loss for the guard."""
        self._losses.append(loss.detach())
        super().backward(loss, **kwargs)

    def step(self, **kwargs: object) -> None:
        """Norm, guard, clip, step."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            raise TrainingStopped(
                "the loss has no gradient: no trainable parameter takes part in it; check targets and latents"
            )
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss = torch.stack(self._losses).sum()
        self._losses = []
        if self.guard is not None and not self.guard(loss, self.grad_norm):
            return
        if self.max_norm > 0:
            clip_grads_with_norm_(parameters, self.max_norm, self.grad_norm)
        self.optimizer.step(**kwargs)
