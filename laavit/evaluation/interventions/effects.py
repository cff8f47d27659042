"""How much an intervention does: to the answers, to how they begin, and to the latents.

All figures are over questions, each with a 95 % interval: Wilson's for shares, a percentile bootstrap for means and
paired differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from laavit.evaluation.interventions.states import LatentStates
from laavit.evaluation.statistics import bootstrap, mcnemar, paired_bootstrap, wilson

#: figures of single questions, as records bear them
MEASURED = ("kl", "latent_shift", "latent_shift_centred")


def kl(reference: Tensor, other: Tensor) -> float:
    """KL(p ‖ q) = Σ p (ln p - ln q) in nats, from log-probabilities [V] of the reference p and the other q."""
    p, q = reference.double(), other.double()
    terms = torch.where(p > -math.inf, p.exp() * (p - q), torch.zeros_like(p))
    return max(0.0, float(terms.sum()))


def latent_shift(reference: LatentStates, other: LatentStates, centre: Tensor | None = None) -> float | None:
    """1 - cosine of the last states of a latent before and after, mean over latents: 0 .. 2.

    Args:
        reference, other: of one question; latents that one of the two never read do not count.
        centre: [K, D], what all questions' latents share; it is taken off both. Decoder states have large entries
            that are the same everywhere, beside which all cosines are near 1.

    Returns:
        None where no latent was read in both.
    """
    both = reference.seen & other.seen
    if not bool(both.any()):
        return None
    taken = 0.0 if centre is None else centre[both].double()
    one, two = reference.final[both].double() - taken, other.final[both].double() - taken
    return float((1 - F.cosine_similarity(one, two, dim=-1)).mean())


def mean(values: Sequence[float]) -> list[float] | None:
    """[mean, low, high]; None where there are no values."""
    return list(bootstrap(np.asarray(values, dtype=np.float64))) if values else None


def share(found: Sequence[bool]) -> list[float]:
    """[share, low, high]."""
    return [sum(found) / len(found), *wilson(sum(found), len(found))]


def effect(on: str, reference: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an intervention did, from records of the same questions in the same order.

    Args:
        on: what was changed. reference: without the intervention. records: with it.

    Returns:
        ``on``, ``n``, ``accuracy``, ``delta`` (intervention - reference, paired), ``p`` (McNemar's exact test),
        ``changed`` (answers that are no longer the same), and ``kl``, ``latent_shift`` and ``latent_shift_centred``,
        None where not measured.

    Raises:
        ValueError: the questions differ, or there are none.
    """
    if [(r["task"], r["id"]) for r in reference] != [(r["task"], r["id"]) for r in records]:
        raise ValueError("an effect compares the same questions in the same order")
    before, after = [r["correct"] for r in reference], [r["correct"] for r in records]
    delta = paired_bootstrap(after, before)
    changed = [one["prediction"] != two["prediction"] for one, two in zip(reference, records)]
    measured = {name: mean([r[name] for r in records if r.get(name) is not None]) for name in MEASURED}
    return {
        "on": on,
        "n": len(records),
        "accuracy": share(after),
        "delta": [delta.mean, delta.low, delta.high],
        "p": mcnemar(after, before),
        "changed": share(changed),
        **measured,
    }
