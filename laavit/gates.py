"""Curriculum sensory gating: how far answer tokens may look at the image at a step (LaViT, Sec. 4.2.1, Eq. 4-5).

A gate is a schedule ``gamma(step) in [0, 1]``, the paths it acts on, and the decoder layers. Attention adds
``B = ln(gamma)`` to the scores on those paths (``-inf`` at 0: closed; exactly 0 at 1: bit-identical to no gate). Gates
act in training only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse.typing import OpenUnitInterval as Share

from laavit.recipe import checked, resolve
from laavit.registry import GATES, UserError, nearest
from laavit.structures import Role

#: The paths a gate can act on: name -> role of the positions that look; all look at the images.
PATHS: dict[str, Role] = {
    "answer->image": Role.ANSWER,
    "question->image": Role.QUESTION,
    "latent->image": Role.LATENT,
}


class Gate:
    """Base of all gates: a schedule gamma(step), the paths and the layers it acts on.

    Args:
        paths: names of ``PATHS``; the paper's gate acts on ``answer->image``.
        layers: decoder layers it acts on, negative ones from the end, or 'first N', 'last N'; None is all.
    """

    def __init__(self, paths: Sequence[str] = ("answer->image",), layers: Sequence[int] | str | None = None) -> None:
        for path in paths:
            if path not in PATHS:
                raise UserError(f"a gate got the path '{path}'; {nearest(path, PATHS)}")
        if isinstance(layers, str) and not re.fullmatch(r"(first|last) [1-9]\d*", layers):
            raise UserError(f"layers: got '{layers}'; allowed: a list of layers, 'first N', 'last N', or none for all")
        self.paths = tuple(paths)
        self.layers = layers if isinstance(layers, str) or layers is None else tuple(layers)

    def set_run(self, steps: int) -> None:
        """Told once, before step 0, how many optimiser steps the run has; a schedule by share of the run reads it."""

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

    def layers_of(self, depth: int) -> frozenset[int] | None:
        """The layers it acts on in a decoder of ``depth``, counted from its start; None is all.

        Raises:
            UserError: one lies outside.
        """
        if self.layers is None:
            return None
        if isinstance(self.layers, str):
            which, count = self.layers.split()
            every: Sequence[int] = range(int(count)) if which == "first" else range(-int(count), 0)
        else:
            every = self.layers
        outside = [layer for layer in every if not -depth <= layer < depth]
        if outside:
            raise UserError(f"layers: the student has {depth} layers, got {self.layers}")
        return frozenset(layer % depth for layer in every)

    def parts(self) -> dict[str, Gate]:
        """The gates it is made of (itself), each by the name that its gamma is logged by."""
        return {"gamma": self}


class WarmupGate(Gate):
    """A gate that is open from the end of its warm-up on; subclasses give gamma before.

    Args:
        warmup: T_w: a number of optimiser steps (paper: 400 of 1000), or a share of the run's steps between 0 and 1,
            which is rounded to whole steps.
        paths: where it acts.
        layers: on which decoder layers it acts; None is all.
    """

    def __init__(self, warmup: int | Share, paths: Sequence[str], layers: Sequence[int] | str | None) -> None:
        super().__init__(paths, layers)
        if isinstance(warmup, float):
            if not 0.0 < warmup < 1.0:
                raise UserError(f"warmup is a number of steps >= 1 or a share of the run in (0, 1), got {warmup}")
        elif warmup < 1:
            raise UserError(f"warmup is a number of steps >= 1 or a share of the run in (0, 1), got {warmup}")
        self.warmup = warmup
        self._steps = None if isinstance(warmup, float) else warmup

    def set_run(self, steps: int) -> None:
        if isinstance(self.warmup, float):
            self._steps = max(1, round(self.warmup * steps))

    @property
    def warmup_steps(self) -> int:
        """T_w in optimiser steps.

        Raises:
            UserError: the warm-up is a share of a run whose length nobody told.
        """
        if self._steps is None:
            raise UserError(
                f"warmup: {self.warmup:g} is a share of the run's steps, and their number is not known; give the "
                "warm-up in steps, or call the gate's set_run(steps) before step 0"
            )
        return self._steps

    def before(self, share: float) -> float:
        """gamma at a share t / T_w of the warm-up, in [0, 1)."""
        raise TypeError(f"{type(self).__name__} must define before(share)")

    def gamma(self, step: int) -> float:
        return 1.0 if step >= self.warmup_steps else self.before(step / self.warmup_steps)


class Ramp(WarmupGate):
    """A gate that opens from ``epsilon`` to 1 over its warm-up; subclasses give its shape.

    Args:
        warmup: T_w in optimiser steps (paper: 400 of 1000), or as a share of the run's steps, between 0 and 1.
        epsilon: eps, the openness at step 0 (paper: 1e-6).
        paths: where it acts.
        layers: decoder layers it acts on, negative ones from the end, or 'first N', 'last N'; None is all.
    """

    def __init__(
        self,
        warmup: int | Share = 400,
        epsilon: float = 1e-6,
        paths: Sequence[str] = ("answer->image",),
        layers: Sequence[int] | str | None = None,
    ) -> None:
        super().__init__(warmup, paths, layers)
        if not 0.0 <= epsilon < 1.0:
            raise UserError(f"epsilon lies in [0, 1), got {epsilon}")
        self.epsilon = epsilon

    def shape(self, share: float) -> float:
        """How far the ramp is at a share of the warm-up in [0, 1): 0 at its begin, 1 at its end."""
        raise TypeError(f"{type(self).__name__} must define shape(share)")

    def before(self, share: float) -> float:
        return self.epsilon + (1.0 - self.epsilon) * self.shape(share)


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
class ExponentialGate(Ramp):
    """gamma(t) = eps^(1 - t / T_w) for t < T_w, 1 after: the bias ln(gamma) rises in a straight line; see ``Ramp``.

    Most of the opening falls into the warm-up's end: with eps = 1e-6 gamma is 0.001 at its middle.
    """

    def __init__(
        self,
        warmup: int | Share = 400,
        epsilon: float = 1e-6,
        paths: Sequence[str] = ("answer->image",),
        layers: Sequence[int] | str | None = None,
    ) -> None:
        super().__init__(warmup, epsilon, paths, layers)
        if epsilon == 0.0:
            raise UserError("epsilon lies in (0, 1) where gamma grows exponentially from it, got 0")

    def before(self, share: float) -> float:
        return self.epsilon ** (1.0 - share)


@GATES.register_module()
class SigmoidGate(Ramp):
    """gamma(t) = eps + (1 - eps) * (s(x) - s(-k)) / (s(k) - s(-k)), s the logistic function, x = k (2 t / T_w - 1).

    For t < T_w, 1 after. The logistic curve is scaled so that it begins at eps and ends at 1 exactly.

    Args:
        warmup: T_w in optimiser steps, or as a share of the run's steps, between 0 and 1.
        epsilon: eps, the openness at step 0.
        steepness: k > 0; near 0 the curve is a straight line, at 6 nine tenths of the opening lie in the middle half.
        paths: where it acts.
        layers: decoder layers it acts on, negative ones from the end, or 'first N', 'last N'; None is all.
    """

    def __init__(
        self,
        warmup: int | Share = 400,
        epsilon: float = 1e-6,
        steepness: float = 6.0,
        paths: Sequence[str] = ("answer->image",),
        layers: Sequence[int] | str | None = None,
    ) -> None:
        super().__init__(warmup, epsilon, paths, layers)
        if not 0.0 < steepness < math.inf:
            raise UserError(f"steepness is a number above 0, got {steepness}")
        self.steepness = steepness

    def shape(self, share: float) -> float:
        # s(y) = (1 + tanh(y / 2)) / 2: the same curve, exact at both ends
        return (1.0 + math.tanh(self.steepness * (share - 0.5)) / math.tanh(self.steepness / 2)) / 2.0


@GATES.register_module()
class StepGate(WarmupGate):
    """gamma(t) = low + (1 - low) * floor(n t / T_w) / n for t < T_w, 1 after: n equal stairs from ``low`` to open.

    One stair with ``low = 0`` is the paper's "w/o curriculum" (hard switch, Table 3).

    Args:
        warmup: T_w in optimiser steps, or as a share of the run's steps, between 0 and 1.
        low: the openness of the first stair.
        stairs: n, the stairs below 1.
        paths: where it acts.
        layers: decoder layers it acts on, negative ones from the end, or 'first N', 'last N'; None is all.
    """

    def __init__(
        self,
        warmup: int | Share = 400,
        low: float = 0.0,
        stairs: int = 1,
        paths: Sequence[str] = ("answer->image",),
        layers: Sequence[int] | str | None = None,
    ) -> None:
        super().__init__(warmup, paths, layers)
        if not 0.0 <= low <= 1.0:
            raise UserError(f"low lies in [0, 1], got {low}")
        if stairs < 1:
            raise UserError(f"stairs is a number of 1 or more, got {stairs}")
        self.low, self.stairs = low, stairs

    def gamma(self, step: int) -> float:
        if step >= self.warmup_steps:
            return 1.0
        done = step * self.stairs // self.warmup_steps  # in whole numbers: no stair begins a step early or late
        return self.low + (1.0 - self.low) * done / self.stairs


@GATES.register_module()
class ConstantGate(Gate):
    """gamma(t) = value throughout: 1 is the paper's "single stage" (Table 3), 0 a closed gate.

    Args:
        value: the openness.
        paths: where it acts.
        layers: decoder layers it acts on, negative ones from the end, or 'first N', 'last N'; None is all.
    """

    def __init__(
        self,
        value: float = 1.0,
        paths: Sequence[str] = ("answer->image",),
        layers: Sequence[int] | str | None = None,
    ) -> None:
        super().__init__(paths, layers)
        if not 0.0 <= value <= 1.0:
            raise UserError(f"value lies in [0, 1], got {value}")
        self.value = value

    def gamma(self, step: int) -> float:
        return self.value


def build_gate(key: str, spec: str | Mapping[str, Any]) -> Gate:
    """A gate from its name in ``registry/gates``, or from ``dict(name=..., arguments)``.

    Raises:
        UserError: no such gate, or arguments that it does not take.
    """
    resolved = resolve(key, "gates", spec)
    try:
        cls = GATES.find(resolved.pop("type"))
        return cls(**checked(key, cls, resolved))
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(key) else f"{key}: {error}") from None


@GATES.register_module()
class PathGates(Gate):
    """A schedule of its own for each path, in one line of a recipe.

    ``gate = dict(name="paths", answer="cosine", question=dict(name="hard", warmup=200))``. Each is a name in
    registry/gates, or dict(name=..., arguments) without ``paths``; a path that is left out is open.

    Args:
        answer: the gate of answer->image.
        question: the gate of question->image.
        latent: the gate of latent->image.
    """

    def __init__(
        self,
        answer: str | dict[str, Any] | None = None,
        question: str | dict[str, Any] | None = None,
        latent: str | dict[str, Any] | None = None,
    ) -> None:
        given = {"answer": answer, "question": question, "latent": latent}
        self._gates: dict[str, Gate] = {}
        for name, spec in given.items():
            if spec is None:
                continue
            if isinstance(spec, Mapping) and "paths" in spec:
                raise UserError(f"{name}: this gate acts on {name}->image; leave 'paths' out")
            self._gates[name] = build_gate(name, spec)
            if isinstance(self._gates[name], PathGates):
                raise UserError(f"{name}: the gate of one path has one schedule, got {spec!r}")
            self._gates[name].paths = (f"{name}->image",)
        if not self._gates:
            raise UserError(f"a gate by path names at least one of {', '.join(given)}")
        super().__init__([f"{name}->image" for name in self._gates])

    def set_run(self, steps: int) -> None:
        for gate in self._gates.values():
            gate.set_run(steps)

    def gamma(self, step: int) -> float:
        """Openness of the least open path."""
        return min(gate.gamma(step) for gate in self._gates.values())

    def parts(self) -> dict[str, Gate]:
        return {f"gamma_{name}": gate for name, gate in self._gates.items()}
