"""Every loss against its formula with loops, in float64, values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from laavit.registry import UserError
from laavit.targets.losses import DIVERGENCES, STATE_LOSSES, info_nce, over_rows

VECTORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda p, w: 1 - (p * w).sum() / (p.square().sum().sqrt() * w.square().sum().sqrt()),
    "mse": lambda p, w: sum((a - b) ** 2 for a, b in zip(p, w)) / len(p),
    "smooth_l1": lambda p, w: sum(
        (a - b) ** 2 / 2 if abs(a - b) < 1 else abs(a - b) - 0.5 for a, b in zip(p, w)
    ) / len(p),
}  # fmt: skip


def log(value: Tensor) -> Tensor:
    return value.log() if value > 0 else value * 0


PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda t, s: sum(a * (log(a) - b.log()) for a, b in zip(t, s)),
    "reverse_kl": lambda t, s: sum(b * (b.log() - a.log()) for a, b in zip(t, s)),
    "js": lambda t, s: sum(
        (a * (log(a) - ((a + b) / 2).log()) + b * (b.log() - ((a + b) / 2).log())) / 2 for a, b in zip(t, s)
    ),
    "mse": lambda t, s: sum((a - b) ** 2 for a, b in zip(t, s)),
}


def same(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", STATE_LOSSES)
def test_state_losses(name: str) -> None:
    torch.manual_seed(0)
    predicted = (2 * torch.randn(3, 2, 5, dtype=torch.float64)).requires_grad_()
    wanted = torch.randn(3, 1, 5, dtype=torch.float64)
    got = STATE_LOSSES[name](predicted, wanted)
    assert got.shape == (3, 2)
    same(got.sum(), sum(VECTORS[name](predicted[b, a], wanted[b, 0]) for b in range(3) for a in range(2)), predicted)


def test_info_nce() -> None:
    torch.manual_seed(0)
    predicted = torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)
    for wanted in (torch.randn(4, 2, 5, dtype=torch.float64), torch.randn(4, 1, 5, dtype=torch.float64)):
        got, expected = info_nce(predicted, wanted, 0.1), torch.zeros((), dtype=torch.float64)
        assert got.shape == (4, 2)
        for b in range(4):
            for a in range(2):
                each = [1 - VECTORS["cosine"](predicted[b, a], other[a % len(other)]) for other in wanted]
                expected = expected - (each[b] / 0.1) + sum((score / 0.1).exp() for score in each).log()
        same(got.sum(), expected, predicted)
    assert info_nce(predicted, predicted.detach(), 0.01).max() < 0.05 < info_nce(predicted, -predicted, 0.1).min()
    with pytest.raises(UserError, match=r"train\.batch_size is at least 2"):
        info_nce(predicted[:1], wanted[:1], 0.1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences(name: str) -> None:
    """Rows of any scale; zeros in the target but for the reverse KL; columns of padding count for nothing."""
    torch.manual_seed(0)
    target = torch.rand(2, 1, 6, dtype=torch.float64)
    if name != "reverse_kl":
        target = target * torch.tensor([1.0, 0, 1, 1, 0, 1])
    target = target / target.sum(-1, keepdim=True)
    rows = torch.rand(2, 3, 6, dtype=torch.float64, requires_grad=True)
    expected = sum(PLAIN[name](target[b, 0], rows[b, r] / rows[b, r].sum()) for b in range(2) for r in range(3))
    pad = torch.zeros(2, 3, 2, dtype=torch.float64)
    got = DIVERGENCES[name](torch.cat([target, pad[:, :1]], -1), torch.cat([rows, pad], -1))
    assert got.shape == (2, 3)
    same(got.sum(), expected, rows)
    own = DIVERGENCES[name](target, 0.3 * target.clamp(min=1e-300))
    assert own.abs().max() < 1e-12 and got.min() > 1e-3
    if name == "js":
        apart = DIVERGENCES["js"](torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double())
        assert apart == pytest.approx(math.log(2))


def test_sum_or_mean_over_the_rows_that_are_there() -> None:
    each, valid = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert over_rows(each, valid).item() == 3.5 and over_rows(each, valid, per_row_mean=True).item() == 2.75


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_a_row_whose_attention_to_the_image_has_underflowed_is_even_over_it(name: str) -> None:
    """KL was below 0 there, which it cannot be: a run that had burst looked as if it had learned."""
    even, gone, half = torch.full((4,), 0.25), torch.zeros(4), torch.tensor([0.5, 0.5, 0.0, 0.0])
    assert float(DIVERGENCES[name](even, gone)) == pytest.approx(0.0, abs=1e-6)
    found = float(DIVERGENCES[name](half, gone))
    assert found == pytest.approx(float(DIVERGENCES[name](half, even)), rel=1e-6)
    if name == "kl":
        assert found == pytest.approx(math.log(2), rel=1e-6)
