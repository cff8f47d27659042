"""``laavit power``: what it prints, and what it refuses."""

import pytest

from laavit.cli import main


def test_a_claim_and_its_questions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["power", "--gain", "10", "--baseline", "60", "--discordant", "20", "--n", "124"]) == 0
    said = capsys.readouterr().out
    assert "20.0 % discordant, as given" in said and "155 questions" in said
    assert "46.0 % discordant, independent answers" in said  # .7 · .4 + .3 · .6
    assert "124 questions at 60 % show" in said and "11.1 points or more" in said


def test_more_comparisons_need_more_questions(capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for many in ("1", "7"):
        assert main(["power", "--gain", "5", "--baseline", "60", "--comparisons", many]) == 0
        counts.append(int(capsys.readouterr().out.splitlines()[-1].split(" questions")[0].split()[-1]))
    assert counts[0] == 1474 < counts[1]


def test_a_tiny_gain_is_answered_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["power", "--gain", "0.05", "--baseline", "60"]) == 0
    assert "exact test" not in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--baseline 60", "needs --gain"),
        ("--baseline 60 --gain 50", "leaves 0 to 100"),
        ("--baseline 160 --n 10", "0 to 100 per cent"),
        ("--baseline 60 --gain 10 --discordant 5", "at least the gain"),
        ("--baseline 60 --gain 5 --comparisons 0", "whole numbers from 1"),
        ("--baseline 60 --n 0", "whole numbers from 1"),
        ("--baseline 60 --gain 5 --power 0.8", "--power 0.8 was given; allowed: per cent, from 1 to less than 100"),
        ("--baseline 60 --gain 5 --level 0.05", "--level 0.05 was given; allowed: per cent"),
        ("--baseline 60 --gain 0", "--gain 0 was given; allowed: points"),
        ("--baseline 60 --gain 5 --power 100", "less than 100"),
    ],
)
def test_mistakes_are_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["power", *words.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
