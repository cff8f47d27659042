"""How sharp a model's attention is (LaViT, Table 2, Fig. 4): entropy, salient regions, CV, and differences of models.

H, the number of salient regions and CV depend on how many image tokens there are: ln N bounds H, N the regions. Models
with other grids, and other data than the paper's, are compared by H / ln N and by the regions' share of N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from laavit.evaluation.analyses.intervals import means
from laavit.evaluation.gaze import NO_LOADING, Looker, check_lookers, look, measures
from laavit.registry import UserError
from laavit.structures import Sample

#: Table 2: mean and standard deviation over BLINK Relative Depth
PAPER = {
    "data": "BLINK Relative Depth",
    "teacher 32B": {"salient": [39.9, 15.6], "entropy": [4.284, 0.787]},
    "base 3B": {"salient": [53.8, 9.0], "entropy": [4.870, 0.216]},
    "LaViT 3B": {"salient": [47.3, 5.6], "entropy": [4.686, 0.204]},
}
#: what a distribution is drawn from
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def attention(
    lookers: Sequence[Looker],
    samples: Sequence[Sample],
    batch_size: int = 32,
    answers: str = "gold",
    max_new_tokens: int = 64,
    loading: Mapping[str, Any] = NO_LOADING,
) -> dict[str, Any]:
    """Table 2 for every looker on the same samples.

    Args:
        answers: the 'gold' ones are given, or each looker gives its 'own'.

    Raises:
        UserError: there is no sample, or a looker cannot be read.
    """
    check_lookers(lookers)
    if not samples:
        raise UserError("there is no sample to look at")
    found: dict[str, dict[str, list[float]]] = {}
    tokens: dict[str, list[int]] = {}
    for looker in lookers:
        traces = look(looker, samples, batch_size, answers, max_new_tokens, loading)
        # float64: the figures are sums over hundreds of tokens
        found[looker.name] = measures([replace(each, gaze=each.gaze.double()) for each in traces], samples)
        tokens[looker.name] = [len(each.gaze) for each in traces]
    return table(found, tokens) | {"n": len(samples), "answers": answers}


def table(found: Mapping[str, Mapping[str, Sequence[float]]], tokens: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Table 2 from every model's measures (``laavit.evaluation.gaze.measures``).

    Returns: for every model and measure its ``mean`` with interval, ``sd`` over samples (as the paper prints it) and
        ``quantiles``; for every pair of models the mean of first - second over the same samples.
    """
    pairs = list(combinations(found, 2))
    measured = [name for name in next(iter(found.values())) if len(next(iter(found.values()))[name])]
    models: dict[str, dict[str, Any]] = {name: {"tokens": [min(each), max(each)]} for name, each in tokens.items()}
    differences: list[dict[str, Any]] = [{"first": one, "second": two, "measures": {}} for one, two in pairs]
    for measure in measured:
        columns = {name: np.asarray(each[measure], dtype=np.float64) for name, each in found.items()}
        together = [*columns.values(), *(columns[one] - columns[two] for one, two in pairs)]
        mean = means(np.stack(together, axis=1))
        for place, (name, column) in enumerate(columns.items()):
            models[name][measure] = {
                "mean": mean[place],
                "sd": float(column.std(ddof=1)) if len(column) > 1 else 0.0,
                "quantiles": [float(each) for each in np.quantile(column, QUANTILES)],
            }
        for each, one in zip(differences, mean[len(columns) :], strict=True):
            each["measures"][measure] = one
    return {"models": models, "differences": differences, "paper": PAPER}
