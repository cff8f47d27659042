"""Answers that are easily read wrongly, each with what a careful reader takes from it; and how others read them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
from lmms_eval.tasks.blink.utils import _extract_answer_letter as blink_letter
from lmms_eval.tasks.cv_bench.utils import _extract_answer_letter as cv_bench_letter
from lmms_eval.tasks.vstar_bench.utils import extract_answer_letter as vstar_letter

from laavit.paths import project_data
from laavit.traces.matching import chosen_option, polar

COLOURS = {"A": "red", "B": "dark blue", "C": "green", "D": "yellow"}
ANIMALS = {"A": "cat", "B": "dog", "C": "cow", "D": "none of the above"}
POINTS = {"A": "A is closer", "B": "B is closer"}
POLAR = {"A": "Yes", "B": "No"}

#: (answer, what it settles on, the options offered)
ADVERSARIAL: list[tuple[str, str | None, dict[str, str]]] = [
    # a letter, however it is dressed
    ("B", "B", COLOURS),
    ("b", "B", COLOURS),
    ("(b)", "B", COLOURS),
    ("B.", "B", COLOURS),
    ("[B]", "B", COLOURS),
    ('"B"', "B", COLOURS),
    ("**B**", "B", COLOURS),
    ("**(B)** dark blue", "B", COLOURS),
    ("Ｂ", "B", COLOURS),
    ("（Ｂ）", "B", COLOURS),
    ("Ⓑ", "B", COLOURS),
    (r"\boxed{B}", "B", COLOURS),
    (r"$\boxed{\text{B}}$", "B", COLOURS),
    (r"A has less of it. Hence \(\boxed{(B)}\).", "B", COLOURS),
    ("<answer>B</answer>", "B", COLOURS),
    ("<think>It could be A or C.</think>B", "B", COLOURS),
    ("答案是B", "B", COLOURS),
    ("ANSWER: B", "B", COLOURS),
    ("Ans: b", "B", COLOURS),
    # an option's text
    ("dark blue", "B", COLOURS),
    ("The answer is dark blue.", "B", COLOURS),
    ("It's dark-blue", None, COLOURS),  # no option's words: undecided rather than guessed
    ("B: dark blue", "B", COLOURS),
    ("A dog", "B", ANIMALS),
    ("None of the above.", "D", ANIMALS),
    ("B is closer", "B", POINTS),
    ("A is closer.", "A", POINTS),
    ("Yes, it is.", "A", POLAR),
    ("No.", "B", POLAR),
    # a letter with an explanation
    ("B. The glove is dark blue and shiny.", "B", COLOURS),
    ("B, because the cloth is dark", "B", COLOURS),
    ("B\nThe cloth is dark.", "B", COLOURS),
    ("(B) The cloth looks dark, not red.", "B", COLOURS),
    ("B - it is as dark as the sea", "B", COLOURS),
    ("B. A dog is sitting there.", "B", ANIMALS),
    ("The answer is **B** because it is darker than A.", "B", COLOURS),
    ("I'd guess it is hard to see. I'd say C", "C", COLOURS),
    ("I am not sure, but the answer is C.", "C", COLOURS),
    ("I cannot see it well; my guess is C.", "C", COLOURS),
    ("First, the cloth is not red.\nSecond, it is not green.\n\nB", "B", COLOURS),
    ("Red is A and blue is B. The cloth is blue, so the correct option is B.", "B", COLOURS),
    # what it is not
    ("(A) is wrong, so the answer is B", "B", COLOURS),
    ("not A but B", "B", COLOURS),
    ("It is not (A), but (B).", "B", COLOURS),
    ("B, not A", "B", COLOURS),
    ("The answer is B, not A.", "B", COLOURS),
    ("The answer is B rather than C", "B", COLOURS),
    ("It can't be A, so B.", "B", COLOURS),
    ("Option A is wrong. Option B is correct.", "B", COLOURS),
    ("The answer is A. No, wait, the answer is B.", "B", COLOURS),
    ("Option A is incorrect", None, COLOURS),
    ("The answer is not B", None, COLOURS),
    ("The answer isn't B.", None, COLOURS),
    ("I don't think the answer is B.", None, COLOURS),
    ("(A) is wrong.", None, COLOURS),
    ("not B", None, COLOURS),
    # several
    ("A and B", None, COLOURS),
    ("Both A and B", None, COLOURS),
    ("A/B", None, COLOURS),
    ("A, B", None, COLOURS),
    ("A or B", None, COLOURS),
    ("The answer is B or C", None, COLOURS),
    ("The answer is A, B", None, COLOURS),
    ("either (A) or (B)", None, COLOURS),
    ("A. red B. dark blue C. green D. yellow", None, COLOURS),
    ("A: wrong. B: right.", None, COLOURS),
    # letters that are words
    ("The image shows a cat.", None, COLOURS),
    ("A dog", None, COLOURS),
    ("A red one and a green one", None, COLOURS),
    ("The answer is A dog", None, COLOURS),
    ("The answer I would like to give is unclear", None, COLOURS),
    ("Because it is dark", None, COLOURS),
    ("Day", None, COLOURS),
    ("Vitamin C", None, COLOURS),
    ("A.M.", None, COLOURS),
    ("B-52 bomber", None, COLOURS),
    ("An A is painted on the wall", None, COLOURS),
    # none at all
    ("", None, COLOURS),
    ("E", None, COLOURS),
    ("The answer is E", None, COLOURS),
    ("I don't know.", None, COLOURS),
    ("I'm sorry, but I cannot answer this.", None, COLOURS),
    ("As an AI model I can't see images.", None, COLOURS),
    ("Is the answer B?", None, COLOURS),
    ("If the answer is B, the cloth is dark", None, COLOURS),
    ("Which option do you mean, A or B?", None, COLOURS),
    ("<think>The answer is B, but let me look ag", None, COLOURS),
    ("\n\n", None, COLOURS),
    # a letter and another option's text
    ("A. dog", None, ANIMALS),
    ("The answer is (A) dark blue", None, COLOURS),
    ("A: dark blue", None, COLOURS),
]


@pytest.mark.parametrize(("answer", "wanted", "offered"), ADVERSARIAL)
def test_reading(answer: str, wanted: str | None, offered: dict[str, str]) -> None:
    assert chosen_option(answer, offered) == wanted


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("B\n\nExplanation: A is red, C is green.", "B"),
        ("**(B)**\n\nThe cloth at A is red.", "B"),
        ("B\nA", None),
        ("A\nred\nB\ndark blue", None),
        ('The answer is "B".', "B"),
        ("The answer is 'B', not 'A'.", "B"),
        ("The letter 'B' is on the wall", None),
        ("I think it's B", "B"),
        ("I don't think it's B", None),
        ("The correct answer is: (B) dark blue, which is left of A.", "B"),
        ("The answer is (B) green, which is left of A.", None),
        ("The answer is (B) dark blue or (A) red", None),
    ],
)
def test_explanations_that_name_other_letters(answer: str, wanted: str | None) -> None:
    assert chosen_option(answer, COLOURS) == wanted


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("**No**, there is none", "no"),
        ("Yes, there is no cat.", "yes"),
        ("The answer is no.", "no"),
        ("My answer: Yes", "yes"),
        (r"\boxed{No}", "no"),
        ("<think>yes?</think> No", "no"),
        ("Yes or no", None),
        ("Yes and no", None),
        ("No idea.", None),
        ("**__Answer__:** No idea", None),
        ("no way to tell", None),
        ("I see no dog", None),
        ("Nothing", None),
        ("Yesterday", None),
        ("", None),
        ("1", None),
    ],
)
def test_yes_and_no(answer: str, wanted: str | None) -> None:
    assert polar(answer) == wanted


@pytest.mark.parametrize(
    "answer", ["A/B", "A, B", "A or B", "Both A and B", "A and C", "not B", "The image shows a cat."]
)
def test_options_whose_texts_are_not_known(answer: str) -> None:
    """A question whose options cannot be read has letters alone."""
    assert chosen_option(answer, dict.fromkeys("ABCD", "")) is None
    assert chosen_option("The answer is (C).", dict.fromkeys("ABCD", "")) == "C"


def _first_letter(answer: str) -> str | None:
    """What is often written: the first letter that stands by itself, in any case."""
    found = re.search(r"\b([A-D])\b", answer, re.I)
    return found[1].upper() if found else None


#: how many of ADVERSARIAL each reads wrongly; eval/README.md shows these figures
WRONG: dict[str, tuple[Callable[[str], str | None], int]] = {
    "the first letter by itself": (_first_letter, 51),
    "lmms-eval, BLINK": (lambda answer: blink_letter(answer, "ABCD"), 53),
    "lmms-eval, V*": (vstar_letter, 58),
    "lmms-eval, MMStar": (lambda answer: extract_mcq_answer(answer, list("ABCD")), 49),
    "lmms-eval, CV-Bench": (cv_bench_letter, 74),
}


@pytest.mark.parametrize("name", WRONG)
def test_how_others_read_them(name: str) -> None:
    reader, wrong = WRONG[name]
    assert sum((reader(answer) or None) != wanted for answer, wanted, _ in ADVERSARIAL) == wrong


def test_the_readme_says_so() -> None:
    text = (project_data("eval") / "README.md").read_text(encoding="utf-8")
    blind = sum(chosen_option(answer, dict.fromkeys(given, "")) != wanted for answer, wanted, given in ADVERSARIAL)
    assert f"| reader | wrong of {len(ADVERSARIAL)} |" in text and f"which decide {blind} of the answers" in " ".join(
        text.split()
    )
    for name, (_, wrong) in WRONG.items():
        assert f"| {name} | {wrong} |" in text.replace("V\\*", "V*")
