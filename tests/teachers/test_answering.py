"""What is recorded while the teacher answers, against a second pass over prompt and answer, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILY_NAMES, tiny
from PIL import Image
from torch import Tensor

from laavit.backbones import Backbone
from laavit.structures import Sample, Trace
from laavit.teachers import ExtractSettings, HFTeacher
from laavit.teachers.extractor import HFExtractor

#: every family is tested; all but these two take their time (``make slow``)
QUICK = ("qwen2_5_vl", "gemma3")
FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY_NAMES]
CASES: list[dict[str, Any]] = [
    {},
    {"rows": ("answer",), "steps": "token", "step_rows": "own", "normalisation": "rows", "semantics_layer": 0},
    {"rows": ("predicting",), "steps": "word", "heads": (1,), "semantics": "full", "repetition_penalty": 1.3},
    {"rows": ("header",), "steps": "token", "layers": (1,), "heads": (0, 1), "semantics": "gaze"},
    {"rows": ("header", "answer"), "heads": ((0, 1), (-2, 0), (-2, -1)), "semantics": "top_k_rows", "top_k": 3},
    {"rows": ("question", "header"), "semantics": "mean", "semantics_layer": -2},
    {"normalisation": "minmax", "max_new_tokens": 1, "steps": "sentence"},
    {"normalisation": "distribution", "prompt_order": "question_first", "system": "You look.", "blind": "teacher"},
]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], HFTeacher]:
    made: dict[str, HFTeacher] = {}

    def open_teacher(name: str) -> HFTeacher:
        if name not in made:
            made[name] = HFTeacher(str(tiny(name, tmp_path_factory.mktemp(name))), dtype="float64")
        return made[name]

    return open_teacher


@pytest.fixture(scope="module")
def asked(samples: list[Sample]) -> list[Sample]:
    """Samples of several sizes and of several images, and one that is a copy: equal samples have equal traces."""
    return [*samples, replace(samples[0], id="again")]


def both(teacher: HFTeacher, samples: list[Sample], **changes: Any) -> tuple[list[Trace], list[Trace]]:
    """The traces of one pass and of two."""
    found = []
    for passes in (1, 2):
        settings = ExtractSettings(**{"max_new_tokens": 7, "passes": passes} | changes)
        extractor = teacher.extractor(settings)
        found.append(extractor([extractor.preparer(sample) for sample in samples]))
    return found[0], found[1]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)


def same(ones: list[Trace], twos: list[Trace]) -> None:
    for one, two in zip(ones, twos, strict=True):
        assert (one.sample_id, one.answer, one.tiles) == (two.sample_id, two.answer, two.tiles)
        assert one.blind_answer == two.blind_answer
        close(one.gaze, two.gaze)
        close(one.semantics, two.semantics)
        assert one.mass == pytest.approx(two.mass, rel=1e-7) and 0 < one.mass < 1
        if two.semantic_tokens is not None:
            assert torch.equal(one.semantic_tokens, two.semantic_tokens)
        assert [(s.text, s.group) for s in one.steps] == [(s.text, s.group) for s in two.steps]
        for mine, other in zip(one.steps, two.steps, strict=True):
            close(mine.gaze, other.gaze)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", CASES, ids=range(len(CASES)))
def test_one_pass_is_two(teachers: Any, asked: list[Sample], family: str, changes: dict[str, Any]) -> None:
    ones, twos = both(teachers(family), asked, **changes)
    same(ones, twos)
    if changes.get("steps", "none") != "none":
        assert any(trace.steps for trace in ones)


@contextmanager
def ending(backbone: Backbone, ids: list[int]) -> Iterator[None]:
    """These tokens end an answer as well."""
    stops = backbone.stops
    backbone.__dict__["stops"] = [*stops, *ids]
    try:
        yield
    finally:
        backbone.__dict__["stops"] = stops


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_that_end_at_different_lengths(teachers: Any, asked: list[Sample], family: str) -> None:
    teacher = teachers(family)
    backbone = teacher.backbone
    prompts = [teacher.extractor(ExtractSettings()).preparer(sample).prompt for sample in asked]
    words = backbone.tokenizer([backbone.generate([prompt], 7)[0] for prompt in prompts], add_special_tokens=False)
    ends = [ids[2] for ids in words["input_ids"][:2] if len(ids) > 2]  # two of the samples end early
    assert ends
    with ending(backbone, ends):
        ones, twos = both(teacher, asked, steps="token")
    same(ones, twos)
    assert len({len(backbone.tokenizer.encode(trace.answer)) for trace in ones}) > 1


def test_an_answer_that_ends_at_once_is_recorded(teachers: Any, asked: list[Sample]) -> None:
    teacher = teachers("qwen2_5_vl")
    everything = list(range(len(teacher.backbone.tokenizer)))
    with ending(teacher.backbone, everything):
        same(*both(teacher, asked, steps="token"))


def test_a_batch_of_one_and_a_batch_without_padding(teachers: Any, samples: list[Sample]) -> None:
    for family, count in itertools.product(QUICK, (1, 2)):
        same(*both(teachers(family), [samples[0]] * count))


def test_the_window_of_an_early_image(teachers: Any, tmp_path: Path) -> None:
    """Gemma 3's sliding layers have lost the image when the answer begins; the cache keeps it for the others' rows."""
    teacher = teachers("gemma3")
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "a.png")
    window = int(teacher.backbone.model.config.get_text_config().sliding_window)
    long = Sample("long", (tmp_path / "a.png",), "what colour is the shape ? " * (1 + window // 4), "red")
    short = Sample("short", (tmp_path / "a.png",), "what colour ?", "red")
    same(*both(teacher, [long, short]))


def test_the_prompt_is_read_once(teachers: Any, asked: list[Sample]) -> None:
    teacher = teachers("qwen2_5_vl")
    read: list[int] = []
    handle = teacher.backbone.family.decoder(teacher.backbone.model).register_forward_pre_hook(
        lambda module, inputs, named: read.append(named["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        extractor: HFExtractor = teacher.extractor(ExtractSettings(max_new_tokens=5))
        prepared = [extractor.preparer(sample) for sample in asked]
        extractor(prepared)
    finally:
        handle.remove()
    longest = max(len(item.prompt.input_ids) for item in prepared)
    assert read[0] == longest and max(read[1:]) < longest // 2
