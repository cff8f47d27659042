"""What counts as a match: the same answer in other words does, a wrong, hedged or undecided one never."""

import random

import pytest

from laavit.traces.matching import chosen_option, match_score, options, words

OPTIONS = "Which colour is it?\n(A) red\n(B) dark blue\n(C) 3"
MANY = "Pick one.\n(A) cat\n(B) dog\n(C) cow\n(D) I\n(E) three\n(F) 3\n(G) the"


@pytest.mark.parametrize(
    ("prediction", "target", "question"),
    [
        ("Blue.", "blue", ""),
        ("the Blue", " blue ", ""),
        ("three", "3", ""),
        ("3.0", "3", ""),
        ("1,000", "1000", ""),
        ("1,234,567.50", "1234567.5", ""),
        ("$5", "5", ""),
        ("12%", "12 %", ""),
        ("-4", "-4.0", ""),
        ("−4", "-4", ""),
        ("Twenty-one", "21", ""),
        ("007", "007", ""),
        ("Yes, it is.", "yes", ""),
        ("Yes, there is no cat.", "yes", ""),
        ("No cat is there", "no", ""),
        ("No", "no.", ""),
        ("dark-blue", "Dark-Blue!", ""),
        ("dark‑blue", "dark-blue", ""),
        ("ＡＢＣ", "abc", ""),
        ("New  York", "new york", ""),
        ("B", "dark blue", OPTIONS),
        ("(B) dark blue", "B", OPTIONS),
        ("B - dark blue", "B", OPTIONS),
        ("**B**", "B", OPTIONS),
        ("b.", "(B)", OPTIONS),
        ("dark blue", "B", OPTIONS),
        ("(A) is wrong, so the answer is B", "B", OPTIONS),
        ("Answer: (B)", "B", OPTIONS),
        ("The answer is B, dark blue.", "B", OPTIONS),
        ("The answer is **B** because it is darker than A.", "B", OPTIONS),
        ("The correct answer is option B.", "B", OPTIONS),
        ("The answer is B. Option A is wrong.", "B", OPTIONS),
        ("It's B.", "B", OPTIONS),
        ("I choose B", "B", OPTIONS),
        ("B is correct", "B", OPTIONS),
        (r"\boxed{B}", "B", OPTIONS),
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
        (".", "blue", ""),
        ("13", "3", ""),
        ("3 or 4", "3", ""),
        ("$5", "5%", ""),
        ("3.01", "3", ""),
        ("5²", "52", ""),
        ("0,125", "125", ""),
        ("7", "007", ""),
        ("2125551235", "2125551234", ""),  # 5e-10 apart, relatively
        ("1" * 400, "2" * 400, ""),  # both infinite as floats
        ("three dogs", "3", ""),
        ("It is, yes", "no", ""),
        ("nothing", "no", ""),
        ("No idea.", "no", ""),
        ("no way to tell", "no", ""),
        ("Yes or no", "yes", ""),
        ("yes/no", "yes", ""),
        ("No, yes", "no", ""),
        ("Yesterday", "yes", ""),
        ("not blue", "blue", ""),
        ("blue or red", "blue", ""),
        ("dog left of cat", "cat left of dog", ""),
        ("a", "the", ""),
        ("A", "B", OPTIONS),
        ("(A) is wrong, so the answer is B", "A", OPTIONS),
        ("A cat is in the image", "A", OPTIONS),
        ("The image shows a cat.", "A", OPTIONS),
        ("A blue one", "A", OPTIONS),
        ("D", "B", OPTIONS),
        ("The answer is D", "B", OPTIONS),
        ("blue", "B", OPTIONS),
        ("not B", "B", OPTIONS),
        ("The answer is not B", "B", OPTIONS),
        ("The answer isn't B", "B", OPTIONS),
        ("The answer is B or C", "B", OPTIONS),
        ("The answer is A, B", "A", OPTIONS),
        ("Answer: A and B", "A", OPTIONS),
        ("Option A is wrong", "A", OPTIONS),
        ("Option A is incorrect; the answer is C", "A", OPTIONS),
        ("The answer is A. No, the answer is B.", "A", OPTIONS),
        ("Is the answer B or A?", "B", OPTIONS),
        ("A or B", "A", OPTIONS),
        ("A, B, C", "A", OPTIONS),
        ("", "B", OPTIONS),
        ("I would say the answer I like is unclear", "D", MANY),
        ("3", "E", MANY),  # two options say three: undecided
        ("the", "A", MANY),
        ("", "G", MANY),
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


def test_only_offered_letters_and_reflexive():
    random_source = random.Random(0)
    text = "A B C D (A) (B) answer is option the not red dark blue 3 or and . , yes no"
    vocabulary = text.split()
    offered = options(OPTIONS)
    for _ in range(3000):
        text = " ".join(random_source.choices(vocabulary, k=random_source.randint(1, 8)))
        assert chosen_option(text, offered) in {None, "A", "B", "C"}
        assert 0.0 <= match_score(text, "blue", OPTIONS) <= 1.0
        if words(text) and not any(word in ("yes", "no") for word in words(text)):
            assert match_score(text, text) == 1.0
