"""Latent collapse: do K latents hold K things, and do they differ from question to question?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laavit.evaluation.interventions.effects import mean
from laavit.evaluation.interventions.states import LatentStates


def pairwise_cosine(states: Tensor) -> float:
    """The mean cosine over the K (K - 1) / 2 pairs of [K, D], K >= 2: 1 where all point the same way."""
    unit = F.normalize(states.double(), dim=-1)
    count = len(unit)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1)))


def effective_rank(states: Tensor) -> float:
    """exp(-Σ p ln p) with p the singular values' shares of their sum (Roy & Vetterli 2007): [N, D] -> 1 .. min(N, D).

    1 where all rows are multiples of one, N where they are orthogonal and of equal norm; 0 of zeros.
    """
    values = torch.linalg.svdvals(states.double())
    if not float(values.sum()) > 0:
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def likeness(states: Tensor) -> Tensor:
    """Each sample's mean cosine to the others, mean over latents: [n, K, D] -> [n], n >= 2."""
    unit = F.normalize(states.double(), dim=-1)
    own = unit.square().sum(-1)
    return (((unit * unit.sum(0)).sum(-1) - own) / (len(unit) - 1)).mean(-1)


def collapse(latents: Sequence[LatentStates]) -> dict[str, Any] | None:
    """How alike latents are, by their states after the final norm; None without any that were all read.

    Returns:
        ``latents`` K; ``pairwise_cosine`` and ``effective_rank``: of a question's K latents, mean over questions (the
        cosine None where K = 1); ``across_cosine``: of the same latent in different questions; ``across_rank``: the
        effective rank of one latent's states over questions, their mean taken off, mean over latents. The latter two
        are None with one question.
    """
    whole = [one.final for one in latents if bool(one.seen.all())]
    if not whole:
        return None
    states = torch.stack(whole)  # [n, K, D]
    several = len(states) > 1
    centred = (states.double() - states.double().mean(0)).transpose(0, 1)
    return {
        "latents": states.shape[1],
        "pairwise_cosine": mean([pairwise_cosine(one) for one in states]) if states.shape[1] > 1 else None,
        "effective_rank": mean([effective_rank(one) for one in states]),
        "across_cosine": mean(likeness(states).tolist()) if several else None,
        "across_rank": sum(map(effective_rank, centred)) / states.shape[1] if several else None,
    }
