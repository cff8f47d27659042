"""Every recorded quantity of every family against whole maps and hidden states, written out naively in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from families import FAMILY_NAMES, tiny
from torch import Tensor
from transformers import AutoModelForImageTextToText

from laavit.structures import Encoded, Role, Sample, Trace
from laavit.teachers import ExtractSettings, HFTeacher

#: every family is tested; all but these two take their time (``make slow``)
QUICK = ("qwen2_5_vl", "gemma3")
FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY_NAMES]
ANSWER = "the blue  shape. It is left!"


@dataclass
class Naive:
    """One sample by itself: its sequence, every attention map [L, H, S, S], every layer's states [L + 1, S, D]."""

    item: Encoded
    maps: Tensor
    states: Tensor
    image: Tensor  # positions of the image tokens


@dataclass
class Family:
    teacher: HFTeacher
    samples: list[Sample]
    naive: dict[str, list[Naive]]  # by prompt order

    prepared: dict[str, list[Any]] = field(default_factory=dict)

    def traces(self, **changes: Any) -> list[Trace]:
        settings = ExtractSettings(answer="gold", **changes)
        extractor = self.teacher.extractor(settings)
        if settings.prompt_order not in self.prepared:
            self.prepared[settings.prompt_order] = [extractor.preparer(sample) for sample in self.samples]
        return extractor(self.prepared[settings.prompt_order])


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]) -> Callable[[str], Family]:
    made: dict[str, Family] = {}

    def open_family(name: str) -> Family:
        if name not in made:
            folder = tiny(name, tmp_path_factory.mktemp(name))
            asked = [Sample(s.id, s.images, s.question, ANSWER, s.boxes) for s in samples[1:]]
            teacher = HFTeacher(str(folder), dtype="float64")
            twin = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=torch.float64, attn_implementation={"text_config": "plain", "vision_config": "sdpa"}
            ).eval()
            twin.set_experts_implementation("eager")  # grouped matrix products know no float64
            naive = {
                order: [look(teacher, twin, s, order) for s in asked] for order in ("image_first", "question_first")
            }
            made[name] = Family(teacher, asked, naive)
        return made[name]

    return open_family


@torch.no_grad()
def look(teacher: HFTeacher, twin: Any, sample: Sample, order: str) -> Naive:
    """transformers' own model on one sample: no batch, no cached features, positions as the model counts them."""
    builder = teacher.extractor(ExtractSettings(prompt_order=order)).preparer.builder
    item = builder.encode(sample, sample.answer)
    ids = item.input_ids[None]
    inputs = {k: v for k, v in item.vision.items() if k not in teacher.backbone.family.geometry_keys}
    inputs |= teacher.backbone.family.text_inputs(ids)
    out = twin.model(input_ids=ids, output_attentions=True, output_hidden_states=True, use_cache=False, **inputs)
    states = torch.stack([state[0] for state in out.hidden_states])
    image = torch.cat([span.positions() for span in item.spans])
    return Naive(item, torch.stack([layer[0] for layer in out.attentions]), states, image)


def rows_of(naive: Naive, kinds: tuple[str, ...]) -> list[int]:
    item = naive.item
    found = {
        "question": [i for i, role in enumerate(item.roles) if role == Role.QUESTION],
        "header": list(range(*item.header)),
        "answer": [i for i, role in enumerate(item.roles) if role == Role.ANSWER],
        "predicting": [i for i, label in enumerate(item.labels) if label >= 0],
    }
    return [place for kind in kinds for place in found[kind]]


def expected_map(naive: Naive, rows: list[int], pairs: list[tuple[int, int]], normalisation: str) -> Tensor:
    """Eq. 2, and what the setting makes of it."""
    total = torch.zeros(len(naive.image), dtype=torch.float64)
    for i in rows:
        row = torch.zeros_like(total)
        for layer, head in pairs:
            row += naive.maps[layer, head, i][naive.image] / len(pairs)
        total += (row / max(float(row.sum()), 1e-300) if normalisation == "rows" else row) / len(rows)
    if normalisation == "minmax":
        total = (total - total.min()) / (total.max() - total.min() + 1e-8)
    return total / total.sum() if normalisation == "distribution" else total


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def every_pair(naive: Naive, layers: list[int]) -> list[tuple[int, int]]:
    return [(layer, head) for layer in layers for head in range(naive.maps.shape[1])]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["image_first", "question_first"])
def test_gaze_and_mass(opened: Callable[[str], Family], family: str, order: str) -> None:
    made = opened(family)
    depth = made.teacher.backbone.depth
    # (Gemma 3's sliding layers do not see the image from the answer; layer 1 of its three does.)
    cases: list[tuple[dict[str, Any], list[tuple[int, int]] | list[int]]] = [
        ({}, list(range(depth))),
        ({"rows": ("question", "answer"), "layers": "last 2", "normalisation": "rows"}, [depth - 2, depth - 1]),
        ({"rows": ("answer",), "layers": (0, -2), "normalisation": "minmax"}, [0, depth - 2]),
        ({"rows": ("predicting",), "heads": (1,), "normalisation": "distribution"}, [(i, 1) for i in range(depth)]),
        ({"rows": ("header", "answer"), "heads": ((0, 1), (-2, 0), (-2, -1))}, []),
        ({"rows": ("header",), "layers": (1,), "heads": (0, 1)}, [(1, 0), (1, 1)]),
    ]
    for changes, which in cases:
        for trace, naive in zip(made.traces(prompt_order=order, **changes), made.naive[order], strict=True):
            pairs = which if which and isinstance(which[0], tuple) else every_pair(naive, which)  # type: ignore[arg-type]
            if not which:
                pairs = [(0, 1), (depth - 2, 0), (depth - 2, naive.maps.shape[1] - 1)]
            rows = rows_of(naive, changes.get("rows", ("question", "header", "answer")))
            close(trace.gaze, expected_map(naive, rows, pairs, changes.get("normalisation", "none")))  # type: ignore[arg-type]
            raw = expected_map(naive, rows, pairs, "none")  # type: ignore[arg-type]
            assert trace.mass == pytest.approx(float(raw.sum()), rel=1e-8) and 0 < trace.mass < 1
            assert trace.tiles == tuple(span.tile for span in naive.item.spans)
            assert trace.gaze.shape == (sum(tile.cells for tile in trace.tiles),)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [-1, 0])
def test_semantics_of_every_kind_and_layer(opened: Callable[[str], Family], family: str, layer: int) -> None:
    made = opened(family)
    for kind in ("mean", "gaze", "gaze_top_k", "top_k_rows", "full"):
        traces = made.traces(
            semantics=kind, semantics_layer=layer - (kind == "mean"), top_k=3, prompt_order="question_first"
        )
        for trace, naive in zip(traces, made.naive["question_first"], strict=True):
            depth = len(naive.maps)
            states = naive.states[(layer - (kind == "mean")) % depth + 1][naive.image]
            rows = rows_of(naive, ("question", "header", "answer"))
            gaze = expected_map(naive, rows, every_pair(naive, list(range(depth))), "none")
            scaled = (gaze - min(gaze)) / (max(gaze) - min(gaze) + 1e-8)
            strongest = sorted(range(len(gaze)), key=lambda j: -float(gaze[j]))[:3]
            if kind in ("top_k_rows", "full"):
                tokens = strongest if kind == "top_k_rows" else list(range(len(gaze)))
                assert trace.semantic_tokens is not None and trace.semantic_tokens.tolist() == tokens
                close(trace.semantics, states[tokens])
                continue
            assert trace.semantic_tokens is None
            chosen = strongest if kind == "gaze_top_k" else list(range(len(gaze)))
            weights = [1.0 if kind == "mean" else float(scaled[j]) for j in chosen]
            expected = sum(w * states[j] for w, j in zip(weights, chosen, strict=True)) / sum(weights)
            close(trace.semantics, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "rows"), [("token", "own"), ("word", "predicting"), ("sentence", "own")])
def test_steps(opened: Callable[[str], Family], family: str, kind: str, rows: str) -> None:
    made = opened(family)
    traces = made.traces(steps=kind, step_rows=rows, normalisation="rows" if kind == "word" else "none")
    tokenizer = made.teacher.backbone.tokenizer
    for trace, plain, naive in zip(traces, made.traces(), made.naive["image_first"], strict=True):
        first = min(i for i, label in enumerate(naive.item.labels) if label >= 0) + 1
        ids = naive.item.input_ids[first:-1].tolist()  # the answer, without what ends the turn
        before = len(made.teacher.backbone.family.answer_frame[0])
        ends = [
            max(len(tokenizer.decode(ids[: n + 1])) - before, 0) for n in range(len(ids))
        ]  # by incremental decoding
        assert ends[-1] == len(ANSWER)
        texts = {"token": None, "word": ANSWER.split(), "sentence": ["the blue  shape.", "It is left!"]}[kind]
        steps: list[list[int]] = [[] for _ in (texts or ids)]
        for n, end in enumerate(ends):
            read = ANSWER[:end]
            if kind == "token":
                place = n
            elif read.isspace() or read.endswith(" "):  # a blank goes to what follows it
                place = len(read.split()) if kind == "word" else int("." in read)
            else:
                place = len(read.split()) - 1 if kind == "word" else int(end > ANSWER.index(".") + 1)
            steps[place].append(first + n - (rows == "predicting"))
        pairs = every_pair(naive, list(range(len(naive.maps))))
        assert "".join(step.text for step in trace.steps) == ANSWER if texts is None else True
        assert texts is None or [step.text for step in trace.steps] == texts
        assert len(trace.steps) == len(steps)
        for step, own in zip(trace.steps, steps, strict=True):
            assert step.group == ""
            close(step.gaze, expected_map(naive, own, pairs, "rows" if kind == "word" else "none"))
        if kind != "word":  # the aggregate is what it is without steps
            close(trace.gaze, plain.gaze)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_order_decides_whether_states_know_the_question(
    opened: Callable[[str], Family], family: str
) -> None:
    """Image first, a causal decoder's image states cannot have seen the question (whatever the paper says)."""
    made = opened(family)
    image = made.samples[0].images

    def states(order: str) -> Tensor:
        extractor = made.teacher.extractor(ExtractSettings(answer="gold", semantics="mean", prompt_order=order))
        asked = [Sample(q, image, q, "blue") for q in ("What colour is the shape?", "What is left of the circle?")]
        return torch.stack([trace.semantics for trace in extractor([extractor.preparer(s) for s in asked])])

    one, two = states("image_first")
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    one, two = states("question_first")
    assert (one - two).abs().max() > 1e-4
