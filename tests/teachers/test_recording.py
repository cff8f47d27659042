"""Extraction against Eq. 2-3 written out over whole maps in float64, and what V_sem can and cannot depend on."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from laavit.backbones import collate
from laavit.backbones.rows import ROW_KINDS
from laavit.structures import Box, Role, Sample, Span, Tile, Trace
from laavit.teachers import ExtractSettings, HFTeacher
from laavit.teachers.extractor import HFExtractor, record

GOLD = ExtractSettings(answer="gold", batch_size=3)


def traces_of(extractor: HFExtractor, samples: list[Sample]) -> list[Trace]:
    return extractor([extractor.preparer(sample) for sample in samples])


@pytest.fixture(scope="module")
def teacher(tiny_folder: Path) -> HFTeacher:
    return HFTeacher(str(tiny_folder), dtype="float64")


def plain_rows(teacher: HFTeacher, ids: list[int], kinds: tuple[str, ...], spans: tuple[Span, ...]) -> list[int]:
    """Positions of each kind, counted in the token texts: ``... user image question <|im_end|> assistant answer``."""
    texts = [teacher.backbone.tokenizer.decode([i]) for i in ids]
    turns = [i for i, text in enumerate(texts) if text == "<|im_start|>"]
    ends = [i for i, text in enumerate(texts) if text == "<|im_end|>"]
    assistant = turns[-1]
    newline = next(i for i in range(assistant, len(texts)) if "\n" in texts[i])
    found = {
        "question": list(range(spans[-1].stop + 1, ends[1 if len(turns) == 3 else 0])),
        "header": list(range(assistant, newline + 1)),
        "answer": list(range(newline + 1, ends[-1] + 1)),
    }
    return [place for kind in kinds for place in found[kind]]


def plain_maps(teacher: HFTeacher, sample: Sample, settings: ExtractSettings) -> tuple[Any, Any, Tensor]:
    """One sample by itself through an eager twin: its sequence, the maps of all layers, the last layer's states."""
    builder = teacher.extractor(settings).preparer.builder
    item = builder.encode(sample, sample.answer)
    twin = copy.deepcopy(teacher.backbone.model)
    twin.set_attn_implementation({"text_config": "plain", "vision_config": "sdpa"})
    with torch.no_grad():
        out = twin.model(
            item.input_ids[None], position_ids=item.position_ids[:, None], output_attentions=True, **item.vision
        )
    return item, out.attentions, out.last_hidden_state[0]


def plain_semantics(states: Tensor, scores: Tensor, pooling: str, top_k: int) -> Tensor:
    if pooling == "mean":
        return sum(states) / len(states)
    weights = (scores - min(scores)) / (max(scores) - min(scores) + 1e-8)
    if pooling == "gaze_top_k":
        kept = sorted(range(len(weights)), key=lambda j: -weights[j])[:top_k]
        weights = torch.stack([w if j in kept else w * 0 for j, w in enumerate(weights)])
    return sum(w * state for w, state in zip(weights, states, strict=True)) / weights.sum()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rows": ("question",), "semantics": "mean"},
        {"rows": ("header", "answer"), "layers": (-2, -1), "semantics": "gaze"},
        {"rows": ("answer",), "layers": (0,), "top_k": 2},
        {"rows": ("header",), "system": "You are a helpful assistant.", "top_k": 1},
    ],
)
def test_gaze_and_semantics_equal_equations_2_and_3(teacher: HFTeacher, samples: list[Sample], changes: dict) -> None:
    settings = replace(GOLD, **changes)
    for sample, trace in zip(samples, traces_of(teacher.extractor(settings), samples), strict=True):
        item, maps, states = plain_maps(teacher, sample, settings)
        rows = plain_rows(teacher, item.input_ids.tolist(), settings.rows, item.spans)
        image = [place for span in item.spans for place in range(span.start, span.stop)]
        layers = [maps[layer] for layer in settings.layers or range(3)]
        scores = torch.zeros(len(image), dtype=torch.float64)  # S_j of Eq. 2
        for each in layers:
            for head in range(each.shape[1]):
                for i in rows:
                    scores += each[0, head, i, image] / (len(layers) * each.shape[1] * len(rows))
        torch.testing.assert_close(trace.gaze, scores, rtol=1e-9, atol=1e-12)
        assert trace.mass == pytest.approx(float(scores.sum()), rel=1e-9) and 0 < trace.mass < 1
        assert trace.tiles == tuple(span.tile for span in item.spans)
        expected = plain_semantics(states[image], scores, settings.semantics, settings.top_k)
        torch.testing.assert_close(trace.semantics, expected, rtol=1e-8, atol=1e-10)
        assert trace.sample_id == sample.id and trace.answer == sample.answer


def test_a_batch_of_traces_is_its_samples(teacher: HFTeacher, samples: list[Sample]) -> None:
    settings = replace(GOLD, answer="teacher", max_new_tokens=5)
    extractor = teacher.extractor(settings)
    for trace, sample in zip(traces_of(extractor, samples), samples, strict=True):
        (alone,) = traces_of(extractor, [sample])
        assert trace.answer == alone.answer and trace.tiles == alone.tiles
        torch.testing.assert_close(trace.gaze, alone.gaze, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(trace.semantics, alone.semantics, rtol=1e-9, atol=1e-10)


def test_the_gaze_is_read_off_the_teachers_own_answer(teacher: HFTeacher, samples: list[Sample]) -> None:
    settings = replace(GOLD, answer="teacher", max_new_tokens=4, rows=("answer",))
    (trace,) = traces_of(teacher.extractor(settings), samples[:1])
    prompt = teacher.extractor(settings).preparer.builder.prompt_of(samples[0])
    assert trace.answer == teacher.backbone.generate([prompt], 4)[0]
    item = teacher.extractor(settings).preparer.builder.with_answer(prompt, trace.answer)
    (again,) = record(teacher.backbone, [item], [trace.answer], settings)
    torch.testing.assert_close(trace.gaze, again.gaze, rtol=1e-9, atol=1e-12)


# --- what the semantics depend on -------------------------------------------------------------------------------------


def semantics_of_two_questions(teacher: HFTeacher, pictures: list[Path], **changes: Any) -> tuple[Tensor, Tensor]:
    questions = ("What colour is the shape?", "What is left of the circle?")
    pair = [Sample(str(i), (pictures[0],), question, "blue") for i, question in enumerate(questions)]
    one, two = traces_of(teacher.extractor(replace(GOLD, **changes)), pair)
    return one.semantics, two.semantics


def test_image_first_mean_pooling_cannot_depend_on_the_question(teacher: HFTeacher, pictures: list[Path]) -> None:
    one, two = semantics_of_two_questions(teacher, pictures, semantics="mean")
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    "changes",
    [
        {"semantics": "gaze_top_k", "top_k": 3},
        {"semantics": "gaze"},
        {"semantics": "mean", "prompt_order": "question_first"},
        {"semantics": "gaze", "prompt_order": "question_first"},
    ],
)
def test_gaze_pooling_or_question_first_make_it_contextual(
    teacher: HFTeacher, pictures: list[Path], changes: dict
) -> None:
    one, two = semantics_of_two_questions(teacher, pictures, **changes)
    assert (one - two).abs().max() > 1e-3


def test_a_teacher_is_frozen_and_in_eval_mode(teacher: HFTeacher) -> None:
    assert not teacher.backbone.model.training
    assert not any(p.requires_grad for p in teacher.backbone.model.parameters())


def test_rows_of_a_student_with_latents_can_be_read_too(lab: Any, samples: list[Sample], tmp_path: Path) -> None:
    lab.student(2, dtype="float32").backbone.save(tmp_path)
    teacher = HFTeacher(str(tmp_path))
    settings = replace(GOLD, rows=("latents", "separator"))
    extractor = teacher.extractor(settings, latents=2)
    traces = traces_of(extractor, samples)
    items = [extractor.preparer.builder.encode(sample, sample.answer) for sample in samples]
    batch = collate(items, teacher.backbone.family, 0)
    assert ROW_KINDS["separator"](batch).sum(1).tolist() == [1, 1, 1]
    assert (batch.roles == Role.LATENT).sum(1).tolist() == [2, 2, 2]
    assert all(trace.mass > 0 for trace in traces)


@pytest.mark.parametrize("pooling", ["gaze_top_k", "gaze", "mean"])
def test_an_image_of_one_token_has_its_own_state(teacher: HFTeacher, tmp_path: Path, pooling: str) -> None:
    """Eq. 3 makes zeros of a constant map; the semantics are then the plain mean."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "dot.png")
    (trace,) = traces_of(
        teacher.extractor(replace(GOLD, semantics=pooling)), [Sample("dot", (tmp_path / "dot.png",), "?", "no")]
    )
    assert trace.tiles == (Tile(1, 1),) and torch.isfinite(trace.semantics).all() and trace.semantics.abs().sum() > 0


def test_boxes_do_not_change_a_trace(teacher: HFTeacher, samples: list[Sample]) -> None:
    """The teacher never sees the annotation."""
    moved = [replace(sample, boxes=(Box(0, 0, 0.1, 0.1),)) for sample in samples]
    for one, two in zip(
        traces_of(teacher.extractor(GOLD), samples), traces_of(teacher.extractor(GOLD), moved), strict=True
    ):
        assert torch.equal(one.gaze, two.gaze) and torch.equal(one.semantics, two.semantics)
