"""Whether a free-form answer says the same as the ground truth: options, numbers, yes and no, words.

Everything here errs on one side: a right answer in unusual words may be missed (a judge can look at it again,
``judges.py``), a wrong or undecided one is not taken for right. What was read wrongly elsewhere and must not be here is
listed in ``tests/traces/test_matching.py``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal

# fmt: off
_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# fmt: on
_NUMBERS = {word: str(value) for value, word in enumerate(_ONES)}
_NUMBERS |= {word: str(10 * value) for value, word in enumerate(_TENS, 2)}
_NUMBERS |= {f"{ten}-{one}": str(10 * i + j) for i, ten in enumerate(_TENS, 2) for j, one in enumerate(_ONES[1:10], 1)}

#: Dashes that NFKC leaves apart, and the multiplication's and quotation's typographic twins.
_SIGNS = str.maketrans({**dict.fromkeys("‐‑‒–—−", "-"), "’": "'", "‘": "'", "“": '"', "”": '"'})
_POWER = re.compile(r"(?<=\d)(?=[²³¹⁰⁴⁵⁶⁷⁸⁹])")  # NFKC would make 52 of 5²
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
# A leading zero makes it a code ("007"), which is compared as text.
_NUMBER = re.compile(r"([$€£]?)\s*([+-]?(?:0|[1-9]\d*)(?:\.\d+)?)\s*(%?)", re.A)
_OPTION = re.compile(r"(?:(?<=\s)|^)(?:\(([A-Z])\)|([A-Z])[.):])\s*(.+?)(?=\s+(?:\([A-Z]\)|[A-Z][.):])\s|\s*$)", re.S)
_LETTER = re.compile(r"\(?([A-Z])\)?[.:)]?", re.I)
_MARKUP = re.compile(r"[*_`$]|\\boxed|\\text|[{}]")
_NAMED = r"(?:\(([A-Z])\)|([A-Z])(?![\w'-]))"
#: "the answer is (B)", "Answer: B", "option B", "it is B", "I choose B" ...
_SAID = re.compile(
    r"(?:\b(?i:answer|option|choice)(?i:\s+(?:is|would\s+be|should\s+be))?|\A\s*(?i:it\s+is|it's|this\s+is)"
    r"|\bI(?i:\s+(?:choose|pick|select|go\s+with)))\s*[:=-]?\s*(?i:(?:the\s+)?(?:option|choice|letter)\s+)?"
    + _NAMED
    + r"([^.!?;\n]*)"
)
#: "B is correct", "(B) is the right answer", at the start of a sentence
_CONFIRMED = re.compile(
    r"(?:\A|[.!?;\n,]\s*|\bso\s+)(?i:option\s+)?" + _NAMED + r"\s+(?i:is\s+(?:the\s+)?(?:correct|right))\b()"
)
_REASON = re.compile(r"\W*(?:because|since|as|due to|for)\b", re.I)
_DENIAL = re.compile(r"\b(?:not|wrong|incorrect|false|never|unlikely|or|nor|neither|and|if|but)\b|n't\b", re.I)
_POLAR = re.compile(r"\W*(yes|no)\b", re.I)
_UNDECIDED = re.compile(
    r"\W*(?:yes\W*(?:(?:or|and)\W+)?no|no\W*(?:(?:or|and)\W+)?yes)\b"
    r"|\W*no\s+(?:idea|clue|answer|info\w*|image|picture|way\s+to|one\s+can|comment|context|evidence)\b",
    re.I,
)


def words(text: str) -> list[str]:
    """An answer as comparable words: lower case, no articles or end punctuation, numbers as digits."""
    text = unicodedata.normalize("NFKC", _POWER.sub("^", text)).translate(_SIGNS).casefold().strip()
    text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)  # 1,000 -> 1000
    parts = [part.strip(".,;:!?\"'`()[]{}") or part for part in re.split(r"[\s/]+", text) if part]
    return [_NUMBERS.get(part, part) for part in parts if part not in ("a", "an", "the", ".", ",")]


def options(question: str) -> dict[str, str]:
    """The lettered options that a question offers, "(A) red (B) blue" or "A. red": letter -> text."""
    found = {bracketed or plain: text.strip() for bracketed, plain, text in _OPTION.findall(question)}
    # Only an unbroken run from A is a list of options; "Plan B: ..." is not.
    return found if len(found) >= 2 and sorted(found) == [chr(65 + place) for place in range(len(found))] else {}


def chosen_option(answer: str, offered: Mapping[str, str]) -> str | None:
    """The offered letter that an answer settles on, or ``None``: never a guess from a stray letter.

    It settles on one by the letter alone, by an option's text (with its letter or without), or by a sentence that names
    exactly one letter as the answer; a letter that is denied, one of several, or asked about is not named.
    """
    text = _MARKUP.sub("", answer).strip()
    if (alone := _LETTER.fullmatch(text)) and alone[1].upper() in offered:
        return alone[1].upper()
    spelled = [word for word in words(text) if word != "-"]
    texts = {letter: words(option) for letter, option in offered.items()}
    for wanted in ([letter.lower()] + option for letter, option in texts.items()):
        if spelled == wanted:
            return wanted[0].upper()
    equal = [letter for letter, option in texts.items() if spelled and spelled == option]
    if equal:
        return equal[0] if len(equal) == 1 else None
    said = {
        bracketed or plain
        for pattern in (_SAID, _CONFIRMED)
        for bracketed, plain, tail in pattern.findall(text)
        if _settled(tail, bracketed or plain, texts)
    }
    return said.pop() if len(said) == 1 and said <= offered.keys() else None


def _settled(tail: str, letter: str, texts: Mapping[str, Sequence[str]]) -> bool:
    """Whether the rest of a sentence that named a letter leaves it standing."""
    if _REASON.match(tail) or words(tail) == texts.get(letter):
        return True
    others = {found for found in re.findall(r"(?<![\w'])([A-Z])(?![\w'])", tail) if found in texts and found != letter}
    return not others and not _DENIAL.search(tail)


def number(parts: Sequence[str]) -> tuple[Decimal, str] | None:
    """The value and the unit sign of words that are one number, else None; exact, however many digits."""
    found = _NUMBER.fullmatch(" ".join(parts))
    return (Decimal(found[2]), found[1] + found[3]) if found else None


def match_score(prediction: str, target: str, question: str = "") -> float:
    """How well a free-form answer matches the ground truth, in [0, 1]; 1 is a match.

    In this order: offered options by letter or text; numbers by value ("3.0" = "three", "1,000" = "1000"; a unit
    sign must not differ where both give one); yes and no by the first word; else ROUGE-L's F1 over ``words``, which is
    1 exactly where the words are equal in order.
    """
    offered = options(question)
    if offered and (wanted := chosen_option(target, offered)):
        return float(chosen_option(prediction, offered) == wanted)
    said, wanted_words = words(prediction), words(target)
    if not said or not wanted_words:
        return float(said == wanted_words and prediction.strip() == target.strip())
    if wanted_number := number(wanted_words):
        found = number(said)
        if found is None:
            return 0.0
        units = {unit for unit in (found[1], wanted_number[1]) if unit}
        return float(found[0] == wanted_number[0] and len(units) < 2)
    if wanted_words in (["yes"], ["no"]):
        polar = _POLAR.match(prediction)
        return float(polar is not None and polar[1].casefold() == wanted_words[0] and not _UNDECIDED.match(prediction))
    common = _longest_common(said, wanted_words)
    return 2 * common / (len(said) + len(wanted_words))


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, 1):
            row[place], before = (before + 1 if word == other else max(row[place], row[place - 1])), row[place]
    return row[-1]
