"""Every name in registry/targets takes part in a step: finite, above zero, and reaching the parameters it should."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from laavit.model import LaViT
from laavit.recipe import Recipe, cards
from laavit.structures import AnswerLogits, Encoded, Role, Sample, Step, Trace
from laavit.targets import ConceptTarget, Target
from laavit.targets.base import stack
from laavit.targets.maps import MapTarget

#: of a store that holds all that any target asks for
HEADER = {
    "width": 24,
    "static": "cls",
    "teacher": "vit",
    "settings": {
        "semantics": "full",
        "top_k": 8,
        "steps": "token",
        "step_rows": "predicting",
        "answer": "gold",
        "logits": 5,
    },
}
PREFIX = "student.model.model.language_model."


def built(name: str) -> Target:
    target: Target = Recipe({"targets": {"t": name}}).build("targets.t")
    return target


def rich(lab: Any, sample: Sample, encoded: Encoded) -> Trace:
    """A trace with steps, a token each, all rows of semantics, and answer logits."""
    plain = lab.trace(sample)
    generator = torch.Generator().manual_seed(len(sample.question))
    count, tokens = len(plain.gaze), int((encoded.labels >= 0).sum()) - 1
    maps = torch.rand(tokens, count, generator=generator, dtype=torch.float64).square()
    steps = tuple(Step("word", "", gaze) for gaze in maps)
    states = torch.randn(count, 24, generator=generator, dtype=torch.float64)
    logprobs, ids = torch.randn(tokens + 1, 300, generator=generator).log_softmax(-1).topk(5)
    logits = AnswerLogits(encoded.labels[encoded.labels >= 0], ids, logprobs)
    return replace(plain, steps=steps, semantics=states, semantic_tokens=torch.arange(count), logits=logits)


def reached(model: LaViT, loss: Tensor) -> set[str]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.fixture(scope="module")
def students(lab: Any) -> dict[int, Any]:
    """A student without latents and one with four; nothing steps them."""
    return {count: lab.student(count) for count in (0, 4)}


@pytest.mark.parametrize("name", cards("targets"))
def test_a_registered_target_is_alive(lab: Any, students: dict[int, Any], samples: list[Sample], name: str) -> None:
    target = built(name)
    latents = 0 if name.endswith("no_latents") else 4
    student = students[latents]
    target.setup(student.backbone.width, student.backbone.depth, student.latents, HEADER)
    model = LaViT(student, None, {"t": target}).double().train()
    items = lab.encode(model, samples)
    batch = lab.batch(lab.model({}, student=student), samples, items=items)
    traces = [rich(lab, sample, item) if target.needs_trace else None for sample, item in zip(samples, items)]
    batch.targets["t"] = stack([target.prepare(item, trace) for item, trace in zip(items, traces, strict=True)])
    losses = model(batch)
    assert losses["t"] > 0 and torch.isfinite(losses["t"])
    torch.testing.assert_close(losses["loss"].detach(), losses["ntp"] + target.weight * losses["t"])

    output = model.observe(batch)
    found = reached(model, target(output, batch.roles, batch.targets["t"]))
    decoder = {n for n, p in model.named_parameters() if n.startswith("student.") and p.requires_grad}
    heads = {n for n, _ in model.named_parameters() if n.startswith("targets.")}
    assert not any("visual" in n for n in decoder)
    if isinstance(target, MapTarget):  # rows of the last layer depend on its queries and keys, and on all below
        last = f"{PREFIX}layers.2."
        past = {
            n for n in decoder if n.startswith(last) and not any(s in n for s in ("q_proj", "k_proj", "input_layer"))
        }
        assert found == decoder - past - {f"{PREFIX}norm.weight"} and not heads
    else:
        assert found == decoder | heads and len(heads) == (4 if isinstance(target, ConceptTarget) else 0)
    if latents:  # and the latents' own embeddings, unless rows before them are aligned
        rows = model.get_parameter(f"{PREFIX}embed_tokens.weight").grad
        assert rows is not None
        moved = rows[batch.input_ids[batch.roles == Role.LATENT].unique()].abs().sum(-1) > 0
        assert moved.all() if name != "trajectory_question" else not moved.any()


def test_the_guide_names_every_target() -> None:
    text = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+)`", text)) >= set(cards("targets"))
