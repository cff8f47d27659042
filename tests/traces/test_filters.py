"""Correctness, alignment and difficulty: what counts as a match, and the columns they write."""

import json
import math
from pathlib import Path

import pytest
import torch

from laavit.registry import FILTERS, UserError
from laavit.structures import Box, Sample, Tile, Trace
from laavit.traces.filters import AlignmentFilter, CorrectnessFilter, DifficultyFilter
from laavit.traces.judges import Question
from laavit.traces.judging import judge, judge_all, settings_of
from laavit.traces.store import TraceStore, TraceWriter


def sample(answer="blue", question="What colour?", boxes=(), key="1"):
    return Sample(key, (Path("a.png"),), question, answer, tuple(boxes))


def trace(answer="blue", gaze=(1.0, 0.0, 0.0, 1.0), grids=((2, 2),), key="1", blind=None):
    tiles = tuple(Tile(*grid, i) for i, grid in enumerate(grids))
    return Trace(key, answer, tiles, torch.tensor(gaze), torch.ones(3), 0.5, blind_answer=blind)


def stored(folder, traces, **header):
    with TraceWriter(folder, header) as writer:
        writer.extend(traces)
    return TraceStore(folder)


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


def test_difficulty_by_the_recorded_blind_answer(tmp_path):
    judgement = DifficultyFilter()
    assert judgement(sample(), trace(blind="Blue.")) == (False, 1.0)
    assert judgement(sample(), trace(blind="red")) == (True, 0.0)
    with pytest.raises(UserError, match="no text-only answer to sample '1'"):
        judgement(sample(), trace())
    with pytest.raises(UserError, match=r"holds no answers given without the image.*extract\.blind"):
        judge(stored(tmp_path / "a", [trace()]), unread(), "difficulty", judgement)


def unread():
    """Samples that must not be looked at: what is wrong is said before."""
    raise AssertionError("judging has begun")
    yield


def test_what_a_store_cannot_tell_is_refused_before_judging(tmp_path):
    few = stored(tmp_path / "few", [trace()], gaze_top_k=2)
    with pytest.raises(UserError, match=r"keeps the 2 strongest tokens.*top_k=2"):
        judge(few, unread(), "alignment", AlignmentFilter())
    with pytest.raises(UserError, match="keeps the 2 strongest"):
        judge(few, unread(), "alignment", AlignmentFilter(top_k=3))
    assert judge(few, [sample(boxes=[Box(0, 0, 0.5, 0.5)])], "alignment", AlignmentFilter(top_k=2)) == 1
    for scale, fine in (("none", True), ("distribution", True), ("minmax", False), ("rows", False)):
        store = stored(tmp_path / scale, [trace()], settings={"normalisation": scale})
        if fine:
            judge(store, [sample()], "alignment", AlignmentFilter())
            continue
        with pytest.raises(UserError, match=f"normalised by '{scale}'"):
            judge(store, unread(), "alignment", AlignmentFilter())
        judge(store, [sample()], "alignment", AlignmentFilter(any_scale=True))
    with pytest.raises(UserError, match=r"sample '1' \(1 missing"):
        judge(stored(tmp_path / "b", [trace()]), unread(), "difficulty", DifficultyFilter({"2": "x"}))


def test_answers_that_cannot_be_wrong_are_not_judged(tmp_path):
    for name, header in (("static", {"static": True}), ("gold", {"settings": {"answer": "gold"}})):
        with pytest.raises(UserError, match=r"filters\.correctness: the traces .* wrong"):
            judge(stored(tmp_path / name, [trace()], **header), unread(), "correctness", CorrectnessFilter())


class Agreeing:
    """A judge that takes an answer for right where it begins with the right letter."""

    def __init__(self):
        self.asked = []

    def __call__(self, questions):
        self.asked += questions
        return [(q.answer[0] == q.target[0], 0.9 if q.answer[0] == q.target[0] else 0.1) for q in questions]


def test_the_judge_sees_only_what_does_not_match_and_is_noted(tmp_path):
    judgement = CorrectnessFilter()
    judgement.judge = Agreeing()
    store = stored(tmp_path, [trace("Blue", key="1"), trace("bluish", key="2"), trace("red", key="3")])
    samples = [sample(key=key) for key in "123"]
    assert judge_all(store, samples, {"correctness": judgement}, {"correctness": {"type": "X"}}) == {"correctness": 2}
    assert judgement.judge.asked == [Question("What colour?", "blue", a) for a in ("bluish", "red")]
    again = TraceStore(tmp_path)
    assert again.verdicts()["correctness"] == {"1": True, "2": True, "3": False}
    assert again.scores("correctness") == {"1": 1.0, "2": 0.0, "3": 0.0}
    noted = again.scores("correctness.judge")
    assert math.isnan(noted.pop("1")) and noted == {"2": 0.9, "3": 0.1}
    assert again.verdicts()["correctness.judge"] == {"1": True, "2": True, "3": False}
    assert settings_of(again, "correctness") == settings_of(again, "correctness.judge") == {"type": "X"}
    assert settings_of(again, "other") == {}


def test_judges_are_checked_when_the_filter_is_built():
    with pytest.raises(UserError, match=r"no judge is called 'ml'.*did you mean 'lm'"):
        CorrectnessFilter(judge="ml")
    with pytest.raises(UserError, match=r"judge\.paths: LMJudge takes no 'paths'.*'path'"):
        CorrectnessFilter(judge={"name": "lm", "paths": "x"})
    with pytest.raises(UserError, match="judge"):
        CorrectnessFilter(judge={"name": "lm"})


def test_a_sample_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="sample '1' twice"):
        judge(stored(tmp_path, [trace()]), [sample(), sample()], "correctness", CorrectnessFilter())


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
