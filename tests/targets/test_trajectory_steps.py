"""Maps for layers and for answer tokens, and other divergences, written out over eager attention maps in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from laavit.model import LaViT
from laavit.registry import UserError
from laavit.structures import Batch, Role, Sample, Step, Trace
from laavit.targets.base import stack
from laavit.targets.trajectory import TrajectoryTarget
from laavit.traces.gaze import normalise, top_k
from laavit.traces.grids import resample


def header(**settings: Any) -> dict[str, Any]:
    known = {"steps": "token", "answer": "gold", "step_rows": "predicting", "normalisation": "none"}
    return {"width": 24, "settings": known | settings}


def plain_map(gaze: Tensor, trace: Trace, batch: Batch, b: int, k: int | None, smoothing: float = 0.0) -> Tensor:
    """Eq. 3, the student's tiles, Top-K, a share (each tested against a reference of its own), some of it spread."""
    moved = resample(normalise(gaze), trace.tiles, [span.tile for span in batch.spans[b]])
    kept = moved if k is None else top_k(moved, k)
    return (1 - smoothing) * kept / kept.sum() + smoothing / len(kept)


def row_of(maps: Sequence[Tensor], batch: Batch, b: int, query: int) -> Tensor:
    """A_student of one query: the mean over layers and heads, a share over the image tokens."""
    image = [place for span in batch.spans[b] for place in range(span.start, span.stop)]
    row = sum(each[b, head, query, image] for each in maps for head in range(each.shape[1]))
    return row / row.sum()


def kl(t: Tensor, s: Tensor) -> Tensor:
    return sum(a * (a / b).log() for a, b in zip(t, s, strict=True) if a > 0)


def stepped(trace: Trace, count: int) -> Trace:
    generator = torch.Generator().manual_seed(count + len(trace.sample_id))
    maps = torch.rand(count, len(trace.gaze), generator=generator, dtype=torch.float64).square()
    return replace(trace, steps=tuple(Step(f"word {t}", "object", gaze) for t, gaze in enumerate(maps)))


def check(
    lab: Any, samples: list[Sample], target: TrajectoryTarget, traces: list[Trace], expected: Callable[..., Tensor]
) -> None:
    """Value and gradients against ``expected(maps, batch)``, worked out on a twin with eager attention."""
    student = lab.student()
    target.setup(student.backbone.width, student.backbone.depth, student.latents, header())
    model = LaViT(student, None, {"t": target}).double().train()
    items = lab.encode(model, samples)
    batch = lab.batch(lab.model({}, student=student), samples, items=items)
    batch.targets["t"] = stack([target.prepare(item, trace) for item, trace in zip(items, traces, strict=True)])
    loss = target(model.observe(batch), batch.roles, batch.targets["t"])
    twin = lab.eager(model)
    found = twin.model(batch.input_ids, position_ids=batch.position_ids, output_attentions=True, **batch.vision)
    plain = expected(found.attentions, batch)
    torch.testing.assert_close(loss, plain, rtol=1e-9, atol=1e-10)
    loss.backward()
    plain.backward()
    moved = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert len(moved) > 20
    for name, gradient in moved.items():
        got = model.student.model.get_parameter(name).grad
        torch.testing.assert_close(got, gradient, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(("counts", "layers"), [((3, 1, 7), None), ((2, 2, 5), (2, 0))])
def test_each_layer_follows_its_own_step(lab: Any, samples: list, counts: tuple, layers: tuple | None) -> None:
    traces = [stepped(lab.trace(sample), count) for sample, count in zip(samples, counts, strict=True)]
    own = layers or (0, 1, 2)

    def expected(maps: Sequence[Tensor], batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for b, trace in enumerate(traces):
            for place, layer in enumerate(own):
                step = trace.steps[int(place * len(trace.steps) / len(own))].gaze
                for query in (batch.roles[b] == Role.LATENT).nonzero().flatten().tolist():
                    total = total + kl(plain_map(step, trace, batch, b, 5), row_of([maps[layer]], batch, b, query))
        return total / len(own) / len(traces)

    check(lab, samples, TrajectoryTarget(steps="layers", layers=layers, top_k=5), traces, expected)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_each_answer_token_follows_its_own_map(lab: Any, samples: list, exact: bool, reduction: str) -> None:
    """By the same tokenizer one to one, by another in order; the end of the turn follows nothing."""
    tokenizer = lab.student().backbone.tokenizer
    lengths = [len(tokenizer.encode(sample.answer)) for sample in samples]
    assert len(set(lengths)) > 1
    counts = lengths if exact else [2, 9, 1]
    traces = [stepped(lab.trace(sample), count) for sample, count in zip(samples, counts, strict=True)]

    def expected(maps: Sequence[Tensor], batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for b, trace in enumerate(traces):
            answer = (batch.roles[b] == Role.ANSWER).nonzero().flatten().tolist()
            assert len(answer) == lengths[b] + 2  # the separator predicts the first token, the last is the turn's end
            for i, query in enumerate(answer[: lengths[b]]):
                step = trace.steps[i if exact else int(i * len(trace.steps) / lengths[b])].gaze
                divergence = kl(plain_map(step, trace, batch, b, 8), row_of(maps, batch, b, query))
                total = total + divergence / (lengths[b] if reduction == "mean" else 1)
        return total / len(traces)

    target = TrajectoryTarget(steps="answer", rows=("predicting",), reduction=reduction)
    check(lab, samples, target, traces, expected)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse_kl": lambda t, s: kl(s, t),
    "js": lambda t, s: (kl(t, (t + s) / 2) + kl(s, (t + s) / 2)) / 2,
    "mse": lambda t, s: (t - s).square().sum(),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences(lab: Any, samples: list[Sample], name: str) -> None:
    """Grids of unequal size in one batch: padding counts for nothing in any of them."""
    traces = [lab.trace(sample) for sample in samples]
    smoothing = 0.02 if name == "reverse_kl" else 0.0

    def expected(maps: Sequence[Tensor], batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for b, trace in enumerate(traces):
            target = plain_map(trace.gaze, trace, batch, b, 8, smoothing)
            for query in (batch.roles[b] == Role.LATENT).nonzero().flatten().tolist():
                total = total + DIVERGENCES[name](target, row_of(maps, batch, b, query))
        return total / len(traces)

    check(lab, samples, TrajectoryTarget(divergence=name, smoothing=smoothing), traces, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"divergence": "kld"}, "did you mean 'kl'"),
        ({"divergence": "reverse_kl", "top_k": None}, "give smoothing"),
        ({"smoothing": -0.1}, "got -0.1"),
        ({"steps": "answer"}, "rows is 'predicting', got latents"),
        ({"steps": "layer"}, "did you mean 'layers'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrajectoryTarget(**arguments)


@pytest.mark.parametrize("wrong", [{"steps": "word"}, {"answer": "teacher"}, {"step_rows": "own"}])
def test_answer_maps_need_the_gold_answer_s_tokens(wrong: dict[str, str]) -> None:
    target = TrajectoryTarget(steps="answer", rows=("predicting",))
    ((key, value),) = wrong.items()
    with pytest.raises(UserError, match=rf"extract\.answer gold.*these have extract\.{key} {value}$"):
        target.setup(32, 3, 4, header(**wrong))
    target.setup(32, 3, 4, header())


def test_layers_need_steps() -> None:
    with pytest.raises(UserError, match="each layer follows a step of its own, and these traces hold none"):
        TrajectoryTarget(steps="layers").setup(32, 3, 4, header(steps="none"))
