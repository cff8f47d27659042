"""Correctness, alignment and difficulty: what counts as a match, and the columns they write."""

import json
import math
from pathlib import Path

import pytest
import torch

from laavit.registry import FILTERS, UserError
from laavit.structures import Box, Sample, Tile, Trace
from laavit.traces.filters import (
    AlignmentFilter,
    CorrectnessFilter,
    DifficultyFilter,
    chosen_option,
    judge,
    match_score,
    options,
)
from laavit.traces.store import TraceStore, TraceWriter

OPTIONS = "Which colour is it?\n(A) red\n(B) dark blue\n(C) 3"


def sample(answer="blue", question="What colour?", boxes=(), key="1"):
    return Sample(key, (Path("a.png"),), question, answer, tuple(boxes))


def trace(answer="blue", gaze=(1.0, 0.0, 0.0, 1.0), grids=((2, 2),), key="1"):
    return Trace(
        key, answer, tuple(Tile(*grid, i) for i, grid in enumerate(grids)), torch.tensor(gaze), torch.ones(3), 0.5
    )


@pytest.mark.parametrize(
    ("prediction", "target", "question"),
    [
        ("Blue.", "blue", ""),
        ("the Blue", " blue ", ""),
        ("three", "3", ""),
        ("3.0", "3", ""),
        ("1,000", "1000", ""),
        ("$5", "5", ""),
        ("12%", "12 %", ""),
        ("-4", "-4.0", ""),
        ("Yes, it is.", "yes", ""),
        ("No", "no.", ""),
        ("dark-blue", "Dark-Blue!", ""),
        ("ＡＢＣ", "abc", ""),
        ("New  York", "new york", ""),
        ("B", "dark blue", OPTIONS),
        ("(B) dark blue", "B", OPTIONS),
        ("b.", "(B)", OPTIONS),
        ("dark blue", "B", OPTIONS),
        ("(A) is wrong, so the answer is B", "B", OPTIONS),
        ("Answer: (B)", "B", OPTIONS),
        ("C", "three", OPTIONS),
        ("B. cat", "B", "Pick: A. dog B. cat"),
    ],
)
def test_matches(prediction, target, question):
    assert match_score(prediction, target, question) == 1.0


@pytest.mark.parametrize(
    ("prediction", "target", "question"),
    [
        ("red", "blue", ""),
        ("", "blue", ""),
        ("13", "3", ""),
        ("3 or 4", "3", ""),
        ("$5", "5%", ""),
        ("3.01", "3", ""),
        ("three dogs", "3", ""),
        ("It is, yes", "no", ""),
        ("nothing", "no", ""),
        ("not blue", "blue", ""),
        ("dog left of cat", "cat left of dog", ""),
        ("A", "B", OPTIONS),
        ("(A) is wrong, so the answer is B", "A", OPTIONS),
        ("A cat is in the image", "A", OPTIONS),
        ("The image shows a cat.", "A", OPTIONS),
        ("D", "B", OPTIONS),
        ("The answer is D", "B", OPTIONS),
        ("blue", "B", OPTIONS),
    ],
)
def test_no_matches(prediction, target, question):
    assert match_score(prediction, target, question) < 1.0


def test_scores_between():
    assert match_score("dark blue shorts", "blue shorts") == pytest.approx(2 * 2 / 5)
    assert match_score("red", "blue") == 0.0


def test_options_need_a_run_from_a():
    assert options(OPTIONS) == {"A": "red", "B": "dark blue", "C": "3"}
    assert options("A. dog B. cat") == {"A": "dog", "B": "cat"}
    assert options("Plan B: what is shown?") == {} and options("What is it?") == {}
    assert chosen_option("an apple", {"A": "red", "B": "blue"}) is None


def test_correctness():
    assert CorrectnessFilter()(sample(), trace("Blue")) == (True, 1.0)
    assert CorrectnessFilter()(sample(), trace("dark blue")) == (False, pytest.approx(2 / 3))
    assert CorrectnessFilter(minimum=0.6)(sample(), trace("dark blue"))[0]


def test_alignment_is_the_share_inside_the_boxes():
    boxed = sample(boxes=[Box(0, 0, 0.5, 0.5)])
    assert AlignmentFilter()(boxed, trace()) == (True, 0.5)
    assert AlignmentFilter(minimum=0.51)(boxed, trace()) == (False, 0.5)
    assert AlignmentFilter(top_k=1)(boxed, trace(gaze=(0.4, 0.5, 0, 0))) == (False, 0.0)
    assert AlignmentFilter()(boxed, trace(gaze=(0.0, 0.0, 0.0, 0.0))) == (False, 0.0)
    second = sample(boxes=[Box(0, 0, 1, 1, 1)])
    assert AlignmentFilter()(second, trace(gaze=(1.0, 1.0, 1.0, 1.0, 4.0), grids=((2, 2), (1, 1)))) == (True, 0.5)


def test_alignment_at_the_paper_s_threshold():
    boxed = sample(boxes=[Box(0, 0, 0.5, 0.5)])
    assert AlignmentFilter()(boxed, trace(gaze=(1.0, 4.0, 0.0, 0.0))) == (True, 0.2)
    assert AlignmentFilter()(boxed, trace(gaze=(0.99, 4.0, 0.0, 0.0)))[0] is False


def test_samples_without_boxes_are_a_setting():
    for setting, verdict in (("fail", False), ("pass", True)):
        kept, score = AlignmentFilter(without_boxes=setting)(sample(), trace())
        assert kept is verdict and math.isnan(score)
    with pytest.raises(UserError, match="sample '1' has no boxes"):
        AlignmentFilter(without_boxes="error")(sample(), trace())
    for arguments in ({"without_boxes": "x"}, {"minimum": 20}, {"top_k": 0}):
        with pytest.raises(UserError):
            AlignmentFilter(**arguments)


def test_difficulty_drops_what_needs_no_image(tmp_path):
    judgement = DifficultyFilter({"1": "Blue.", "2": "red"})
    assert judgement(sample(), trace()) == (False, 1.0)
    assert judgement(sample(key="2"), trace(key="2")) == (True, 0.0)
    with pytest.raises(UserError, match="sample '3'"):
        judgement(sample(key="3"), trace(key="3"))
    file = tmp_path / "answers.json"
    file.write_text(json.dumps({"1": "blue"}))
    assert DifficultyFilter(str(file))(sample(), trace()) == (False, 1.0)
    for content, message in (("{", "valid JSON"), ("[]", "not an object"), ('{"1": 2}', "not an object")):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            DifficultyFilter(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        DifficultyFilter(str(tmp_path / "none.json"))


def test_registered_and_written_as_columns(tmp_path):
    for name in ("CorrectnessFilter", "AlignmentFilter", "DifficultyFilter"):
        assert FILTERS.find(name).__name__ == name
    with TraceWriter(tmp_path, {}) as writer:
        writer.append(trace("blue", key="1"))
        writer.append(trace("red", key="2"))
    store = TraceStore(tmp_path)
    samples = [sample(key=key) for key in "123"]
    assert judge(store, samples, "correctness", CorrectnessFilter()) == 1
    assert judge(store, samples, "alignment", AlignmentFilter()) == 0
    again = TraceStore(tmp_path)
    assert again.select(["correctness"]) == ("1",) and len(again) == 2
    assert all(math.isnan(score) for score in again.scores("alignment").values())
    with pytest.raises(UserError, match="missing sample '2'"):
        judge(store, samples[:1], "correctness", CorrectnessFilter())
