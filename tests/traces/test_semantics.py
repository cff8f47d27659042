"""V_sem as Eq. 3 weighs it, and rows of a store pooled as the extraction would have."""

from __future__ import annotations

import pytest
import torch

from laavit.registry import UserError
from laavit.traces.semantics import POOLINGS, pool, select

torch.manual_seed(0)
STATES, GAZE = torch.randn(7, 3, dtype=torch.float64), torch.rand(7, dtype=torch.float64)


def test_pooling_is_written_out() -> None:
    scaled = (GAZE - GAZE.min()) / (GAZE.max() - GAZE.min() + 1e-8)
    torch.testing.assert_close(pool(STATES, GAZE, "mean"), sum(STATES) / 7)
    expected = sum(w * s for w, s in zip(scaled, STATES, strict=True)) / sum(scaled)
    torch.testing.assert_close(pool(STATES, GAZE, "gaze"), expected)
    best = sorted(range(7), key=lambda j: -float(GAZE[j]))[:2]
    expected = sum(scaled[j] * STATES[j] for j in best) / sum(scaled[j] for j in best)
    torch.testing.assert_close(pool(STATES, GAZE, "gaze_top_k", 2), expected)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_rows_of_a_store_pool_to_what_was_not_stored(pooling: str) -> None:
    """All states, or the k strongest where only they are pooled, hold all that the pooling needs."""
    rows, tokens = select(STATES, GAZE, "full")
    torch.testing.assert_close(pool(rows, GAZE, pooling, 3, tokens), select(STATES, GAZE, pooling, 3)[0])
    rows, tokens = select(STATES, GAZE, "top_k_rows", 3)
    assert rows.shape == (3, 3) and tokens is not None and torch.equal(rows, STATES[tokens])
    assert (GAZE[tokens].diff() < 0).all()
    torch.testing.assert_close(pool(rows, GAZE, "gaze_top_k", 3, tokens), select(STATES, GAZE, "gaze_top_k", 3)[0])
    torch.testing.assert_close(pool(rows, GAZE, "mean", 3, tokens), rows.mean(0))


def test_a_flat_gaze_prefers_nothing() -> None:
    for pooling in POOLINGS:
        torch.testing.assert_close(pool(STATES, torch.ones(7).double(), pooling), STATES.mean(0))
        torch.testing.assert_close(pool(STATES[:1], GAZE[:1], pooling), STATES[0])
    weakest = GAZE.argmin()[None]  # its weight is zero by Eq. 3
    torch.testing.assert_close(pool(STATES[weakest], GAZE, "gaze", 8, weakest), STATES[weakest][0])


def test_names() -> None:
    with pytest.raises(UserError, match="did you mean 'gaze_top_k'"):
        pool(STATES, GAZE, "gaze_topk")
    with pytest.raises(UserError, match="did you mean 'top_k_rows'"):
        select(STATES, GAZE, "top_k_row")
