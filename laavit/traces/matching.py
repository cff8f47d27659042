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
_LETTER = re.compile(r"[\"'\[<]*\(?([A-Z])\)?[.:);,!]?[\"'\]>]*", re.I)
_MARKUP = re.compile(r"[*_`$]|\\(?:boxed|text(?:bf|rm|it)?|math(?:rm|bf))|\\(?=[()\[\]])|[{}]")
_QUOTED = re.compile(r"([\"'])(\(?[A-Za-z]\)?)\1")
#: Full-width signs and circled letters, as their plain twins.
_WIDE = str.maketrans({**{0xFF01 + i: 0x21 + i for i in range(94)}, **{0x24B6 + i: 0x41 + i for i in range(26)}})
#: What a model says to itself; an unclosed thought has no answer after it.
_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)|\A.*</think(?:ing)?>", re.S | re.I)
#: What a model marks as its answer.
_MARKED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}|<answer>(.*?)(?:</answer>|\Z)", re.S | re.I)
#: A letter that is named: in brackets, a capital by itself, or a small one at the end of its clause.
_NAMED = r"(?:\(([A-Za-z])\)|([A-Z])(?![\w'-])|([a-z])(?=\s*(?:[.,;!?\n]|\Z)))"
_BE = r"(?i:\s+(?:is|would\s+be|should\s+be|must\s+be|has\s+to\s+be)|\s*:)?"
#: "the answer is (B)", "Answer: B", "option B", "it is B", "I would say B", "答案是B" ...
_SAID = re.compile(
    rf"(?:(?:\b(?i:answer|ans\.?|option|choice|guess)|答案[是为]?){_BE}"
    r"|(?:\A|[.!?;,\n]\s*)(?i:so\s+)?(?i:I\s+(?:think|believe)\s+)?(?i:it\s+is|it's|it\s+must\s+be|this\s+is)"
    r"|\bI(?i:(?:'d|\s+would|'ll|\s+will)?\s+(?:choose|pick|select|say|guess|go\s+with)))"
    rf"\s*[:=-]?\s*(?i:(?:the\s+)?(?:option|choice|letter)\s+)?{_NAMED}([^.!?;\n]*)"
)
#: "B is correct", "(B) is the right answer", at the start of a clause
_CONFIRMED = re.compile(
    rf"(?:\A|[.!?;\n,]\s*|\bso\s+)(?i:option\s+)?{_NAMED}\s+(?i:is\s+(?:the\s+)?(?:correct|right))\b()"
)
#: "not A but B", "so B." at the end of a sentence
_AFTER_ALL = re.compile(
    rf"(?:\b(?i:not\s+(?:option\s+)?)\(?[A-Z]\)?,?\s+(?i:but|rather)|\b(?i:so|thus|hence|therefore),?)\s+{_NAMED}"
    r"(?=\s*(?:[.!\n]|\Z))()"
)
#: "..., not A", "(rather than A)": says what it is not, and takes nothing back
_UNLIKE = re.compile(
    r"[,(]?\s*(?i:and\s+)?(?i:not|rather\s+than|instead\s+of)\s+(?i:option\s+)?\(?[A-Z]\)?(?![\w'])\)?"
)
#: "B. ...", "(B) ...", "B, ...", "B - ...", "B" and a new line: a letter before an explanation
_LEADING = re.compile(r"\A(?:\(([A-Za-z])\)|([A-Za-z])(?:\)|[.:,;!](?=\s)|(?=\s*\n)|(?=\s+-\s)))")
_REFUSED = re.compile(
    r"[\s,:-]*(?:(?:is|was|seems|looks|can|could)\s*)?(?:not|n't|wrong|incorrect|false|cannot|isn't)\b", re.I
)
_STATED = re.compile(r"(?:\banswer\s*(?:is|:)|\A(?:it|this|that)(?:'s|\s+is))\s+([^\n]+?)[.!]?\s*\Z", re.I)
_ARTICLE = re.compile(
    r"\s+(?!because\b|since\b|as\b|due\b|for\b|is\b|which\b|and\b|or\b|not\b|rather\b|instead\b)[a-z]"
)
_DOUBTED = re.compile(
    r"(?:n't|\bnot|\bnever)\s+(?:think|believe|say|agree|mean|that|because)\b[^,;]*\Z|\b(?:doubt|whether|if|unless)\b[^,;]*\Z",
    re.I,
)
_CORRECTED = re.compile(r"\b(?:no|wait|actually|sorry|correction|rather|instead|scratch\s+that|mean)\b", re.I)
_REASON = re.compile(r"\W*(?:because|since|as|due to|for)\b", re.I)
_DENIAL = re.compile(r"\b(?:not|wrong|incorrect|false|never|unlikely|or|nor|neither|and|if|but)\b|n't\b", re.I)
_POLAR = re.compile(r"\W*(?:(?:the|my)\s+)?(?:(?:correct|final)\s+)?(?:answer\s*(?:is|:)\W*)?(yes|no)\b", re.I)
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

    It settles on one by the letter alone or in front, by an option's text (with its letter or without), by what it
    marks as its answer, or by a sentence that names exactly one letter as the answer; a letter that is denied, one of
    several, or asked about is not named, and a thought (<think>) is no answer.
    """
    answer = _THOUGHT.sub("", answer.translate(_WIDE).translate(_SIGNS))
    if marked := _MARKED.findall(answer):
        answer = "".join(marked[-1])
    text = _QUOTED.sub(r"\2", _MARKUP.sub("", answer).strip())
    texts = {letter: words(option) for letter, option in offered.items()}
    if alone := _LETTER.fullmatch(text):
        return alone[1].upper() if alone[1].upper() in offered else None
    spelled = [word for word in words(text) if word != "-"]
    if spelled in ([letter.lower(), *option] for letter, option in texts.items() if option):
        return spelled[0].upper()
    if (leading := _leading(text, texts)) and leading[1]:
        return leading[0]
    equal = [letter for letter, option in texts.items() if spelled and spelled == option]
    if equal:
        return equal[0] if len(equal) == 1 and not leading else None
    said = _said(text, texts)
    if said:
        return said[-1] if said[-1] in offered and said[-1:] == said[:1] else None
    return _otherwise(text, texts) or (leading[0] if leading else None)


def _leading(text: str, texts: Mapping[str, Sequence[str]]) -> tuple[str | None, bool] | None:
    """The letter that a text begins with (None where the rest takes it back), and whether its option's text follows."""
    found = _LEADING.match(text)
    if found is None or (letter := (found[1] or found[2]).upper()) not in texts:
        return None
    rest = _UNLIKE.sub("", text[found.end() - (found[0][-1] == ",") :])
    if words(rest.lstrip(" ,-")) == texts[letter]:
        return letter, True
    # on a line of its own it is the answer, and what follows may say why the others are not; a list is none
    apart = re.match(r"[ \t]*\n", rest) and not any(_LETTER.fullmatch(line.strip()) for line in rest.split("\n"))
    others = not apart and _others(rest, letter, texts)
    taken_back = _REFUSED.match(rest) or others or (words(rest) or None) in texts.values()
    # "A: ..." is how an answer is introduced, too
    return (None if taken_back or found[0] == "A:" else letter), False


def _said(text: str, texts: Mapping[str, Sequence[str]]) -> list[str]:
    """The letters that sentences name as the answer, in order; only the last where it corrects those before."""
    named = []
    for pattern in (_SAID, _CONFIRMED, _AFTER_ALL):
        for found in pattern.finditer(text):
            letter, sentence = next(filter(None, found.groups()[:3])), re.split(r"[.!?;\n]", text[: found.start()])[-1]
            asked = text[found.end() : found.end() + 1] == "?" or _DOUBTED.search(sentence)
            if not asked and _settled(found, letter, texts):
                named.append((found.start(), letter.upper()))
    named.sort()
    letters = [letter for _, letter in named]
    if len(set(letters)) > 1 and _CORRECTED.search(text[named[-2][0] : named[-1][0] + 3]):
        return letters[-1:]
    return letters if len(set(letters)) < 2 else [letters[0], "several"]


def _settled(found: re.Match[str], letter: str, texts: Mapping[str, Sequence[str]]) -> bool:
    """Whether the rest of a sentence that named a letter leaves it standing."""
    tail = _UNLIKE.sub("", found[found.lastindex or 0])
    following = words(tail)
    if _REASON.match(tail) or following == texts.get(letter.upper()):
        return True
    if letter in "AI" and found[1] is None and _ARTICLE.match(tail):  # "the answer is A dog", "the answer I like"
        return False
    own = texts.get(letter.upper())
    others = not (own and following[: len(own)] == own) and _others(tail, letter, texts)
    return not (following in texts.values() or others or _DENIAL.search(tail))


def _others(text: str, letter: str, texts: Mapping[str, Sequence[str]]) -> bool:
    """Whether a text names another of the letters; an article is none."""
    found = re.findall(r"(?<![\w'])(?:\(([A-Za-z])\)|([B-Zb-hj-z]|A(?!\s+[a-z])))(?![\w'])", text)
    return any(other.upper() in texts and other.upper() != letter.upper() for pair in found for other in pair if other)


def _otherwise(text: str, texts: Mapping[str, Sequence[str]]) -> str | None:
    """A letter on the last line, an option's text in place of a letter, yes or no where these are the options."""
    *before, last = (_LETTER.fullmatch(line.strip()) for line in text.split("\n"))
    lone = {found[1].upper() for found in (*before, last) if found}
    if before and last and len(lone) == 1 and lone <= texts.keys():
        return last[1].upper()
    if (stated := _STATED.search(text)) and not _LEADING.match(stated[1]):
        equal = [letter for letter, option in texts.items() if words(stated[1]) == option]
        if len(equal) == 1:
            return equal[0]
    said = polar(text)
    return next((letter for letter, option in texts.items() if [said] == option), None)


def polar(answer: str) -> str | None:
    """'yes' or 'no' where an answer begins with one of them and does not go on to the other; else None."""
    answer = _THOUGHT.sub("", answer.translate(_WIDE))
    if marked := _MARKED.findall(answer):
        answer = "".join(marked[-1])
    text = _MARKUP.sub("", answer)
    found = _POLAR.match(text)
    return found[1].lower() if found and not _UNDECIDED.match(text[found.start(1) :]) else None


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
        return float(polar(prediction) == wanted_words[0])
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
