"""Curriculum sensory gating: how far answer tokens may look at the image at a step (LaViT, Sec. 4.2.1, Eq. 4-5).

A gate is a schedule ``gamma(step) in [0, 1]`` and the paths it acts on. Attention adds ``B = ln(gamma)`` to the scores
on those paths (``-inf`` at 0: closed; exactly 0 at 1: bit-identical to no gate). Gates act in training only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from laavit.registry import GATES, UserError, nearest
from laavit.structures import Role

#: The paths a gate can act on: name -> (role of the queries, role of the keys).
PATHS: dict[str, tuple[Role, Role]] = {
    "answer->image": (Role.ANSWER, Role.IMAGE),
    "question->image": (Role.QUESTION, Role.IMAGE),
    "latent->image": (Role.LATENT, Role.IMAGE),
}


class Gate:
    """Base of all gates: a schedule gamma(step) and the paths it acts on.

    Args:
        paths: names of ``PATHS``; the paper's gate acts on ``answer->image``.
    """

    def __init__(self, paths: Sequence[str] = ("answer->image",)) -> None:
        for path in paths:
            if path not in PATHS:
                raise UserError(f"a gate got the path '{path}'; {nearest(path, PATHS)}")
        self.paths = tuple(paths)

    def gamma(self, step: int) -> float:
        """Openness at an optimiser step, in [0, 1]."""
        raise TypeError(f"{type(self).__name__} must define gamma(step)")

    def bias(self, step: int) -> float:
        """B(t) = ln gamma(t) (Eq. 5); -inf where the gate is closed.

        Raises:
            UserError: gamma lies outside [0, 1].
        """
        gamma = self.gamma(step)
        if not 0.0 <= gamma <= 1.0:
            raise UserError(f"{type(self).__name__}.gamma({step}) is {gamma}; a gate's gamma lies in [0, 1]")
        return math.log(gamma) if gamma > 0.0 else -math.inf


def _positive(name: str, steps: int) -> int:
    if steps < 1:
        raise UserError(f"{name} is a number of steps >= 1, got {steps}")
    return steps


class Ramp(Gate):
    """A gate that opens from ``epsilon`` to 1 over ``warmup`` steps; subclasses give its shape.

    Args:
        warmup: T_w in optimiser steps (paper: 400 of 1000).
        epsilon: eps, the openness at step 0 (paper: 1e-6).
        paths: where it acts.
    """

    def __init__(self, warmup: int = 400, epsilon: float = 1e-6, paths: Sequence[str] = ("answer->image",)) -> None:
        super().__init__(paths)
        if not 0.0 <= epsilon < 1.0:
            raise UserError(f"epsilon lies in [0, 1), got {epsilon}")
        self.warmup, self.epsilon = _positive("warmup", warmup), epsilon

    def shape(self, share: float) -> float:
        """How far the ramp is at a share of the warm-up in [0, 1): 0 at its begin, 1 at its end."""
        raise TypeError(f"{type(self).__name__} must define shape(share)")

    def gamma(self, step: int) -> float:
        if step >= self.warmup:
            return 1.0
        return self.epsilon + (1.0 - self.epsilon) * self.shape(step / self.warmup)


@GATES.register_module()
class CosineGate(Ramp):
    """gamma(t) = eps + (1 - eps)/2 * (1 - cos(pi t / T_w)) for t < T_w, 1 after (Eq. 5); see ``Ramp``."""

    def shape(self, share: float) -> float:
        return (1.0 - math.cos(math.pi * share)) / 2.0


@GATES.register_module()
class LinearGate(Ramp):
    """gamma(t) = eps + (1 - eps) * t / T_w for t < T_w, 1 after; see ``Ramp``."""

    def shape(self, share: float) -> float:
        return share


@GATES.register_module()
class StepGate(Gate):
    """gamma(t) = low for t < T_w, 1 after. ``low = 0`` is the paper's "w/o curriculum" (hard switch, Table 3).

    Args:
        warmup: T_w in optimiser steps.
        low: the openness before the switch.
        paths: where it acts.
    """

    def __init__(self, warmup: int = 400, low: float = 0.0, paths: Sequence[str] = ("answer->image",)) -> None:
        super().__init__(paths)
        if not 0.0 <= low <= 1.0:
            raise UserError(f"low lies in [0, 1], got {low}")
        self.warmup, self.low = _positive("warmup", warmup), low

    def gamma(self, step: int) -> float:
        return 1.0 if step >= self.warmup else self.low


@GATES.register_module()
class ConstantGate(Gate):
    """gamma(t) = value throughout: 1 is the paper's "single stage" (Table 3), 0 a closed gate.

    Args:
        value: the openness.
        paths: where it acts.
    """

    def __init__(self, value: float = 1.0, paths: Sequence[str] = ("answer->image",)) -> None:
        super().__init__(paths)
        if not 0.0 <= value <= 1.0:
            raise UserError(f"value lies in [0, 1], got {value}")
        self.value = value

    def gamma(self, step: int) -> float:
        return self.value
