"""Gaze mathematics against plain loops in float64, values and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laavit.traces import gaze


def random_rows(rows=5, tokens=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 2, rows, tokens + 4, dtype=torch.float64, generator=generator)
    return scores.softmax(-1)[..., :tokens].mean((0, 1)).requires_grad_()


def same_with_gradients(fast, slow, leaf):
    weight = torch.linspace(-1, 1, fast.numel(), dtype=torch.float64).reshape(fast.shape)
    assert torch.allclose(fast, slow, rtol=1e-12, atol=1e-14)
    (first,) = torch.autograd.grad((fast * weight).sum(), leaf, retain_graph=True)
    (second,) = torch.autograd.grad((slow * weight).sum(), leaf, retain_graph=True)
    assert torch.isfinite(first).all() and first.abs().sum() > 0
    assert torch.allclose(first, second, rtol=1e-10, atol=1e-12)


def test_eq_2_over_layers_heads_and_rows():
    maps = torch.rand(2, 3, 4, 6, dtype=torch.float64)  # l, h, i, j
    expected = torch.zeros(6, dtype=torch.float64)
    for j in range(6):
        for layer in range(2):
            for head in range(3):
                for i in range(4):
                    expected[j] += maps[layer, head, i, j] / (2 * 3 * 4)
    assert torch.allclose(gaze.aggregate(maps.mean((0, 1))), expected, rtol=1e-12)


def test_aggregate_and_normalise_match_loops():
    rows, epsilon = random_rows(), 1e-6
    sums = [sum(rows[i, j] for i in range(5)) / 5 for j in range(12)]
    low, high = min(sums, key=lambda value: float(value.detach())), max(sums, key=lambda value: float(value.detach()))
    slow = torch.stack([(value - low) / (high - low + epsilon) for value in sums])
    same_with_gradients(gaze.normalise(gaze.aggregate(rows), epsilon), slow, rows)


@pytest.mark.parametrize("k", [1, 3, 8, 11])
def test_top_k_matches_loops(k):
    rows = random_rows(seed=k)
    full = gaze.normalise(gaze.aggregate(rows))
    kept = sorted(range(12), key=lambda j: (-full[j].item(), j))[:k]
    slow = torch.stack([full[j] if j in kept else full[j] * 0 for j in range(12)])
    same_with_gradients(gaze.top_k(full, k), slow, rows)


def test_distribution_and_statistics_match_loops():
    rows = random_rows()
    full = gaze.aggregate(rows)
    share = [full[j] / sum(full[i] for i in range(12)) for j in range(12)]
    same_with_gradients(gaze.to_distribution(full), torch.stack(share), rows)
    same_with_gradients(gaze.entropy(full), -sum(p * p.log() for p in share), rows)
    mean = sum(full[j] for j in range(12)) / 12
    sigma = (sum((full[j] - mean) ** 2 for j in range(12)) / 12).sqrt()
    same_with_gradients(gaze.cv(full), sigma / mean, rows)
    assert int(gaze.salient_regions(full)) == sum(full[j].item() > 1.5 * mean.item() for j in range(12))


def test_known_values():
    assert gaze.entropy(torch.ones(64, dtype=torch.float64)).item() == pytest.approx(math.log(64))
    assert gaze.entropy(torch.tensor([0.0, 5.0, 0.0])).item() == 0
    assert gaze.cv(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.5)
    assert gaze.salient_regions(torch.tensor([0.0, 0.0, 1.0, 3.0])).item() == 1
    assert torch.equal(gaze.normalise(torch.full((4,), 0.3)), torch.zeros(4))


def test_entropy_of_a_sparse_map_has_finite_gradients():
    leaf = torch.tensor([0.0, 0.2, 0.0, 0.6], dtype=torch.float64, requires_grad=True)
    gaze.entropy(leaf).backward()
    assert torch.isfinite(leaf.grad).all() and leaf.grad[1] != 0


def test_ties_go_to_the_lowest_index():
    tied = torch.tensor([0.5, 1.0, 0.5, 1.0, 0.5])
    assert gaze.top_k(tied, 3).tolist() == [0.5, 1.0, 0, 1.0, 0]
    assert gaze.top_k_indices(tied, 3).tolist() == [1, 3, 0]
    many = torch.ones(5000)  # long enough for an unstable sort to show
    assert gaze.top_k(many, 8).nonzero().flatten().tolist() == list(range(8))


def test_batches_are_single_maps():
    maps = torch.rand(3, 2, 20)
    for function in (gaze.normalise, lambda m: gaze.top_k(m, 4), gaze.to_distribution, gaze.entropy, gaze.cv):
        single = torch.stack([torch.stack([function(maps[a, b]) for b in range(2)]) for a in range(3)])
        assert torch.equal(function(maps), single)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_top_k_keeps_k_of_the_greatest(values, k):
    full = torch.tensor(values, dtype=torch.float64)
    kept = gaze.top_k(full, k)
    assert sorted(kept.tolist(), reverse=True)[:k] == sorted(values, reverse=True)[:k]
    assert int((kept > 0).sum()) <= k
    if k >= len(values):
        assert torch.equal(kept, full)


def test_what_is_no_map_raises():
    for bad, message in (
        (torch.zeros(4), "zero everywhere"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "zero everywhere"),
        (torch.tensor([1.0, -0.1]), "negative"),
        (torch.tensor([1.0, math.nan]), "non-finite"),
        (torch.tensor([1.0, math.inf]), "non-finite"),
    ):
        with pytest.raises(ValueError, match=message):
            gaze.to_distribution(bad)
    with pytest.raises(ValueError, match="at least 1"):
        gaze.top_k(torch.ones(3), 0)
    with pytest.raises(ValueError, match="epsilon"):
        gaze.normalise(torch.ones(3), 0.0)
    with pytest.raises(ValueError, match="R, N"):
        gaze.aggregate(torch.ones(0, 3))
    with pytest.raises(ValueError, match="positive mean"):
        gaze.cv(torch.zeros(3))
