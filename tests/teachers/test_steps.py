"""Answers in steps: which token belongs to which, and the mean of its rows."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laavit.registry import UserError
from laavit.structures import Sample
from laavit.teachers import ExtractSettings, HFTeacher
from laavit.teachers.steps import Steps, split_answer, step_maps, token_offsets


def letters(text: str) -> list[tuple[int, int]]:
    """A token a character."""
    return [(place, place + 1) for place in range(len(text))]


def tagger(text: str) -> list[tuple[int, int, str]]:
    """'The red circle, left.' as a tagger sees it."""
    tags = {"The": "DET", "red": "ADJ", "two": "NUM", "circle": "NOUN", "left": "ADV"}
    found, start = [], 0
    for word in text.replace(",", " , ").replace(".", " . ").split():
        start = text.index(word, start)
        found.append((start, start + len(word), tags.get(word, "PUNCT")))
        start += len(word)
    return found


def test_words_sentences_tokens() -> None:
    answer = "It is. The  red one!\nYes"
    words = split_answer(answer, letters(answer), "word")
    assert words.texts == ("It", "is.", "The", "red", "one!", "Yes") and set(words.groups) == {""}
    assert words.of_token[:6] == (0, 0, 1, 1, 1, 1) and words.of_token[6] == 2  # a blank goes to what follows it
    sentences = split_answer(answer, letters(answer), "sentence")
    assert sentences.texts == ("It is.", "The  red one!", "Yes")
    tokens = split_answer("ab", [(0, 1), (1, 2)], "token")
    assert tokens == Steps(("a", "b"), ("", ""), (0, 1))


def test_bytes_of_one_character_are_one_step_and_a_token_of_two_words_too() -> None:
    assert split_answer("é!", [(0, 1), (0, 1), (1, 2)], "token") == Steps(("é", "!"), ("", ""), (0, 0, 1))
    merged = split_answer("of the cat", [(0, 6), (6, 10)], "word")
    assert merged == Steps(("of the", "cat"), ("", ""), (0, 1))
    assert split_answer("cat", [(0, 0), (0, 3)], "word").of_token == (0, 0)  # a token that covers nothing
    assert split_answer("cat  ", [(0, 3), (3, 5)], "word").of_token == (0, 0)
    for kind in ("token", "word", "sentence"):
        assert split_answer("", [], kind) == Steps((), (), ())
    assert split_answer("  ", [(0, 2)], "word") == Steps((), (), ())


def test_groups_come_from_the_tagger() -> None:
    answer = "The red two circle, left."
    words = split_answer(answer, letters(answer), "word", tagger)
    assert words.groups == ("functional", "attribute", "attribute", "object", "functional")
    runs = split_answer(answer, letters(answer), "group", tagger)
    assert runs.texts == ("The", "red two", "circle", ", left.")
    assert runs.groups == ("functional", "attribute", "object", "functional")
    tokens = split_answer("red.", [(0, 3), (3, 4)], "token", tagger)
    assert tokens.groups == ("attribute", "functional")


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab .!?\né", max_size=30), st.sampled_from(["token", "word", "sentence"]), st.data())
def test_every_token_has_a_step_and_every_step_a_token(answer: str, kind: str, data: Any) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)))) | {0, len(answer)})
    offsets = list(itertools.pairwise(cuts))
    steps = split_answer(answer, offsets, kind)
    if not answer.strip() and kind != "token":
        assert steps.texts == ()
        return
    assert len(steps.of_token) == len(offsets) and sorted(set(steps.of_token)) == list(range(len(steps.texts)))
    assert list(steps.of_token) == sorted(steps.of_token)
    assert "".join("".join(steps.texts).split()) == "".join(answer.split())


def test_maps_are_the_means_of_the_rows() -> None:
    rows = torch.rand(2, 4, 5, dtype=torch.float64)
    steps = [Steps(("a", "b"), ("", ""), (0, 0, 1, 1)), Steps(("c",), ("",), (0, 0, 0))]
    maps = step_maps(rows, steps)
    assert maps.shape == (2, 2, 5)
    torch.testing.assert_close(maps[0, 0], (rows[0, 0] + rows[0, 1]) / 2)
    torch.testing.assert_close(maps[0, 1], (rows[0, 2] + rows[0, 3]) / 2)
    torch.testing.assert_close(maps[1, 0], rows[1, :3].mean(0))
    assert not maps[1, 1].any()
    assert step_maps(rows[:, :0], [Steps((), (), ())] * 2).shape == (2, 0, 5)


# --- with a teacher ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tiny_folder: Path) -> HFTeacher:
    return HFTeacher(str(tiny_folder), dtype="float64")


def traces_of(teacher: HFTeacher, samples: list[Sample], **changes: Any) -> list[Any]:
    extractor = teacher.extractor(ExtractSettings(**changes))
    return extractor([extractor.preparer(sample) for sample in samples])


def test_the_steps_of_an_answer_make_up_its_aggregate(teacher: HFTeacher, samples: list[Sample]) -> None:
    """Own rows of all tokens and the end of the turn are the rows 'answer'."""
    made = traces_of(teacher, samples, answer="gold", rows=("answer",), steps="token", step_rows="own")
    plain = traces_of(teacher, samples, answer="gold", rows=("answer",))
    for trace, without, sample in zip(made, plain, samples, strict=True):
        torch.testing.assert_close(trace.gaze, without.gaze, rtol=1e-9, atol=1e-12)
        assert trace.mass == pytest.approx(without.mass) and without.steps == ()
        assert "".join(step.text for step in trace.steps) == sample.answer
        rest = trace.gaze * (len(trace.steps) + 1) - sum(step.gaze for step in trace.steps)
        assert (rest > -1e-12).all() and 0 < rest.sum() < 1  # what the end of the turn looks at


def test_an_empty_answer_has_no_steps(teacher: HFTeacher, samples: list[Sample]) -> None:
    empty = [Sample("e", samples[0].images, "What?", ""), samples[1]]
    one, two = traces_of(teacher, empty, answer="gold", steps="word")
    assert one.steps == () and [step.text for step in two.steps] == ["the", "blue", "shape"]
    (alone,) = traces_of(teacher, empty[:1], answer="gold", steps="word")
    assert alone.steps == ()


def test_the_teachers_own_answer_is_what_is_cut(teacher: HFTeacher, samples: list[Sample]) -> None:
    for trace in traces_of(teacher, samples, max_new_tokens=6, steps="token"):
        assert "".join(step.text for step in trace.steps) == trace.answer


def test_a_slow_tokenizer_is_named() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="needs a fast tokenizer, which Slow is not"):
        token_offsets(Slow(), "blue")


def test_a_preparer_goes_to_data_workers(teacher: HFTeacher, samples: list[Sample]) -> None:
    extractor = teacher.extractor(ExtractSettings(answer="gold", blind="teacher"))
    content = pickle.dumps(extractor.preparer)
    assert len(content) < 2_000_000
    prepared = [pickle.loads(content)(sample) for sample in samples]  # noqa: S301 - as a data worker does
    for one, two in zip(extractor(prepared), traces_of(teacher, samples, answer="gold", blind="teacher"), strict=True):
        assert torch.equal(one.gaze, two.gaze) and one.blind_answer == two.blind_answer
    with pytest.raises(UserError, match="has no image to look at"):
        extractor.preparer(Sample("x", (), "What?", "x"))
