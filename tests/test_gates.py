"""Gates against their closed forms: at the ends, the middle and past the end (Eq. 5)."""

from __future__ import annotations

import math

import pytest
import torch

from laavit.gates import ConstantGate, CosineGate, Gate, LinearGate, StepGate
from laavit.model import gate_paths
from laavit.registry import GATES, UserError
from laavit.structures import Role


def equation_5(step: int, warmup: int, epsilon: float) -> float:
    if step >= warmup:
        return 1.0
    return epsilon + (1 - epsilon) / 2 * (1 - math.cos(math.pi * step / warmup))


@pytest.mark.parametrize("step", [0, 1, 100, 200, 399, 400, 401, 10_000])
def test_cosine_gate_is_equation_5(step: int) -> None:
    gate = CosineGate()
    assert gate.gamma(step) == pytest.approx(equation_5(step, 400, 1e-6), rel=1e-12)
    assert gate.bias(step) == pytest.approx(math.log(equation_5(step, 400, 1e-6)), rel=1e-12)


def test_cosine_gate_at_named_points() -> None:
    gate = CosineGate(warmup=400, epsilon=1e-6)
    assert gate.gamma(0) == pytest.approx(1e-6, rel=1e-9)
    assert gate.gamma(200) == pytest.approx((1 + 1e-6) / 2)
    assert gate.gamma(400) == 1.0 and gate.bias(400) == 0.0
    values = [gate.gamma(step) for step in range(402)]
    assert values == sorted(values)


def test_the_other_schedules() -> None:
    assert [LinearGate(10, 0.0).gamma(s) for s in (0, 5, 9, 10, 11)] == [0.0, 0.5, 0.9, 1.0, 1.0]
    assert [StepGate(10).gamma(s) for s in (0, 9, 10, 11)] == [0.0, 0.0, 1.0, 1.0]
    assert StepGate(10).bias(0) == -math.inf
    assert ConstantGate(1.0).bias(0) == 0.0 and ConstantGate(0.0).bias(99) == -math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosineGate(warmup=0), "warmup is a number of steps >= 1, got 0"),
        (lambda: CosineGate(epsilon=1.0), "epsilon lies in"),
        (lambda: CosineGate(paths=("answer->imag",)), "did you mean 'answer->image'"),
        (lambda: ConstantGate(1.5), "value lies in"),
    ],
)
def test_bad_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]


def test_a_gate_outside_its_range_is_refused() -> None:
    class Wild(Gate):
        def gamma(self, step: int) -> float:
            return 2.0

    with pytest.raises(UserError, match="gamma lies in"):
        Wild().bias(0)


def test_registered_names() -> None:
    assert {"CosineGate", "LinearGate", "StepGate", "ConstantGate"} <= set(GATES.module_dict)


def test_paths_cover_markup_after_the_image_but_not_the_system_prompt() -> None:
    o, i, q, v, a = (int(role) for role in (Role.OTHER, Role.IMAGE, Role.QUESTION, Role.LATENT, Role.ANSWER))
    roles = torch.tensor([[o, o, i, i, o, q, q, o, v, v, a, a]])
    paths = gate_paths(ConstantGate(0.0, paths=("answer->image", "question->image")), 0, roles)
    assert paths[0].queries.nonzero()[:, 1].tolist() == [10, 11]
    assert paths[1].queries.nonzero()[:, 1].tolist() == [4, 5, 6, 7]
    assert all(path.keys.nonzero()[:, 1].tolist() == [2, 3] for path in paths)
    assert gate_paths(ConstantGate(1.0), 0, roles) == () and gate_paths(None, 0, roles) == ()
