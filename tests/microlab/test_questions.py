from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from laavit.microlab.questions import QUESTION_KINDS, Question, ask, question_kind
from laavit.microlab.scenes import COLOURS, FORMS, Scene, make_scene

SCENES = [make_scene(7, index) for index in range(400)]


def answers(kind: str) -> list[tuple[Scene, Question]]:
    return [(scene, ask(scene, [kind])[0]) for scene in SCENES]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("colour", 6), ("shape", 4), ("relation", 2), ("depth", 2), ("reflectance", 2), ("count", 3)],
)
def test_answers_are_one_word_and_balanced(kind: str, options: int) -> None:
    found = Counter(question.answer for _, question in answers(kind))
    assert len(found) == options and all(" " not in answer for answer in found)
    assert max(found.values()) / len(SCENES) < 1 / options + 0.08


def test_every_question_has_boxes_that_are_shapes() -> None:
    for scene in SCENES[:50]:
        for question in ask(scene):
            assert question.boxes and set(question.boxes) <= {shape.box for shape in scene.shapes}


def test_colour_and_shape_point_at_the_only_match() -> None:
    for scene, question in answers("colour"):
        (match,) = [s for s in scene.shapes if f"the {s.form}?" in question.text]
        assert (match.colour, (match.box,)) == (question.answer, question.boxes)
    for scene, question in answers("shape"):
        (match,) = [s for s in scene.shapes if f"the {s.colour} object" in question.text]
        assert (match.form, (match.box,)) == (question.answer, question.boxes)


def test_relation_is_true_to_the_cells() -> None:
    holds = {
        "left of": lambda a, b: a.column < b.column,
        "right of": lambda a, b: a.column > b.column,
        "above": lambda a, b: a.row < b.row,
        "below": lambda a, b: a.row > b.row,
    }
    asked = Counter()
    for scene, question in answers("relation"):
        word = question.text.removeprefix("Is A ").removesuffix(" B?")
        asked[word] += 1
        assert holds[word](scene.marked("A"), scene.marked("B")) == (question.answer == "yes")
    assert set(asked) == set(holds)


def test_depth_and_reflectance_compare_the_marked_shapes() -> None:
    for scene, question in answers("depth"):
        assert scene.marked(question.answer).size == "large"
    for scene, question in answers("reflectance"):
        assert scene.marked(question.answer).tone == "light"


def test_count_counts_what_it_names_and_boxes_all_of_it() -> None:
    numbers = {"one": 1, "two": 2, "three": 3}
    for scene, question in answers("count"):
        named = [
            s
            for s in scene.shapes
            if (s.colour in question.text.split() if "objects" in question.text else s.form in question.text)
        ]
        assert len(named) == numbers[question.answer] == len(question.boxes)


def test_the_same_scene_gives_the_same_questions_and_a_salt_gives_others() -> None:
    assert ask(SCENES[0]) == ask(SCENES[0])
    assert [ask(scene, salt=1) for scene in SCENES[:20]] != [ask(scene) for scene in SCENES[:20]]


def test_a_new_kind_leaves_the_other_kinds_draws_alone() -> None:
    before = ask(SCENES[0])

    @question_kind("first")
    def first(scene: Scene, rng: np.random.Generator) -> Question:
        boxes = scene.shapes[0].box, scene.shapes[1].box
        return Question("first", "First?", "yes", ((boxes[0],), boxes))

    try:
        assert ask(SCENES[0])[: len(before)] == before
        assert len(ask(SCENES[0], ["first"])[0].boxes) == 2  # a box of two hops is named once
        with pytest.raises(ValueError, match="'first' exists already"):
            question_kind("first")(first)
    finally:
        del QUESTION_KINDS["first"]


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="unknown question kind 'color'"):
        ask(SCENES[0], ["color"])


def test_words_cover_all_attributes() -> None:
    assert {q.answer for _, q in answers("colour")} == set(COLOURS)
    assert {q.answer for _, q in answers("shape")} == set(FORMS)
