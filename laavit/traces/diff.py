"""Two stores compared: headers, samples, answers, verdicts, maps and semantics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from laavit.structures import AnswerLogits, Trace
from laavit.traces import shards
from laavit.traces.store import TraceStore

#: added to a distribution before its logarithm, so that a token that one side does not look at costs a finite amount
EPSILON = 1e-12
#: settings of the data that may differ between machines
PLACES = ("annotations", "root")


@dataclass
class Difference:
    """What differs between two stores; over the samples that both have, where it is a figure.

    Args:
        header: sentence parts. only: samples that one side alone has, (first, second). answers, blind, tiles: samples
            whose answer, blind answer, or tiles differ. verdicts: filter -> samples judged differently (or on one side
            only). gaze_kl: KL(first ‖ second) of the maps as distributions; gaze_abs: greatest difference of a map;
            cosine: of the semantics: each a figure a sample. steps, logits: samples whose trajectories or answer logits
            differ. same: samples that are equal bit for bit.
    """

    header: list[str] = field(default_factory=list)
    only: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    common: int = 0
    answers: list[str] = field(default_factory=list)
    blind: list[str] = field(default_factory=list)
    tiles: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    semantics: list[str] = field(default_factory=list)
    logits: list[str] = field(default_factory=list)
    verdicts: dict[str, list[str]] = field(default_factory=dict)
    quarantined: list[str] = field(default_factory=list)
    gaze_kl: dict[str, float] = field(default_factory=dict)
    gaze_abs: dict[str, float] = field(default_factory=dict)
    mass_abs: dict[str, float] = field(default_factory=dict)
    cosine: dict[str, float] = field(default_factory=dict)
    same: int = 0

    @property
    def equal(self) -> bool:
        """Whether the stores say the same of the same samples, bit for bit."""
        lists = (self.header, *self.only, self.quarantined, *self.verdicts.values())
        return not any(lists) and self.same == self.common


def header_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs between two headers, a sentence part a key; where hashed data lie does not count."""
    texts = shards.differences(_placeless(first), _placeless(second), subset=False)
    return [text.replace("in the store", "in the first").replace("here", "in the second") for text in texts]


def _placeless(header: Mapping[str, Any]) -> dict[str, Any]:
    data = header.get("data") or {}
    hashed = PLACES if "annotations_sha256" in data else ()
    return {**header, "data": {key: value for key, value in data.items() if key not in hashed}}


def divergence(first: Tensor, second: Tensor) -> float:
    """KL(first ‖ second) in nats of two maps [N] as distributions; NaN where a map has no mass."""
    if not bool(first.sum() > 0) or not bool(second.sum() > 0):
        return 0.0 if torch.equal(first, second) else math.nan
    p, q = first.double() / first.double().sum(), second.double() / second.double().sum()
    return float((p * ((p + EPSILON).log() - (q + EPSILON).log())).sum().clamp(min=0))


def compare(first: TraceStore, second: TraceStore) -> Difference:
    """Everything that differs between two stores; one pass over what both have."""
    found = Difference(header=header_differences(first.header, second.header))
    found.only = ([k for k in first.ids if k not in second], [k for k in second.ids if k not in first])
    aside = {*first.quarantined, *second.quarantined}
    found.quarantined = sorted(k for k in aside if first.quarantined.get(k) != second.quarantined.get(k))
    both = [key for key in first.ids if key in second]
    found.common = len(both)
    ours, theirs = first.verdicts(), second.verdicts()
    for name in sorted({*ours, *theirs}):
        left, right = ours.get(name, {}), theirs.get(name, {})
        if other := [key for key in both if left.get(key) != right.get(key)]:
            found.verdicts[name] = other
    for key in track(both, "comparing", console=Console(stderr=True), transient=True):
        _compare(found, key, first.get(key), second.get(key))
    return found


def _compare(found: Difference, key: str, one: Trace, two: Trace) -> None:
    """Add what differs between two traces of one sample."""
    same = True
    for name, left, right in (
        ("answers", one.answer, two.answer),
        ("blind", one.blind_answer, two.blind_answer),
        ("tiles", one.tiles, two.tiles),
    ):
        if left != right:
            getattr(found, name).append(key)
            same = False
    if one.tiles == two.tiles:
        found.gaze_kl[key] = divergence(one.gaze, two.gaze)
        found.gaze_abs[key] = float((one.gaze - two.gaze).abs().max())
        same &= torch.equal(one.gaze, two.gaze)
        if not _equal_steps(one, two):
            found.steps.append(key)
            same = False
    if not _equal_logits(one.logits, two.logits):
        found.logits.append(key)
        same = False
    found.mass_abs[key] = abs(one.mass - two.mass)
    same &= one.mass == two.mass
    if one.semantics.shape == two.semantics.shape and _equal(one.semantic_tokens, two.semantic_tokens):
        rows = torch.cosine_similarity(one.semantics.double(), two.semantics.double(), dim=-1)
        found.cosine[key] = float(rows.mean())
        same &= torch.equal(one.semantics, two.semantics)
    else:
        found.semantics.append(key)
        same = False
    found.same += same


def _equal(one: Tensor | None, two: Tensor | None) -> bool:
    return one is two or (one is not None and two is not None and torch.equal(one, two))


def _equal_logits(one: AnswerLogits | None, two: AnswerLogits | None) -> bool:
    if one is None or two is None:
        return one is two
    return all(_equal(a, b) for a, b in ((one.tokens, two.tokens), (one.ids, two.ids), (one.logprobs, two.logprobs)))


def _equal_steps(one: Trace, two: Trace) -> bool:
    if len(one.steps) != len(two.steps):
        return False
    pairs = zip(one.steps, two.steps, strict=True)
    return all(a.text == b.text and a.group == b.group and torch.equal(a.gaze, b.gaze) for a, b in pairs)
