"""The three filters of LaViT-SFT-15K (arXiv 2601.10129): correctness, difficulty, alignment.

A filter is called with a sample and its trace and answers ``(verdict, score)``: whether the sample is kept, and the
figure behind it. Verdicts become columns of the trace store; nothing is deleted, a recipe selects.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from laavit.registry import FILTERS, UserError
from laavit.structures import Sample, Trace
from laavit.traces.gaze import top_k
from laavit.traces.grids import in_box_mass, sample_mask
from laavit.traces.store import TraceStore

Filter = Callable[[Sample, Trace], tuple[bool, float]]

_COUNTS = """zero one two three four five six seven eight nine ten
eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"""
_NUMBERS = {word: str(value) for value, word in enumerate(_COUNTS.split())}
_NUMBER = re.compile(r"([$€£]?)\s*([+-]?\d+(?:\.\d+)?)\s*(%?)")
_OPTION = re.compile(r"(?:(?<=\s)|^)(?:\(([A-Z])\)|([A-Z])[.):])\s*(.+?)(?=\s+(?:\([A-Z]\)|[A-Z][.):])\s|\s*$)", re.S)
_LETTER = re.compile(r"\(?([A-Z])\)?[.:)]?", re.I)
_SAID = re.compile(
    r"\b(?i:answer|option|choice)(?i:\s+is|\s+would be)?\s*:?\s*(?i:option\s+)?(?:\(([A-Z])\)|([A-Z])(?![\w']))"
)


def words(text: str) -> list[str]:
    """An answer as comparable words: lower case, no articles or end punctuation, numbers as digits."""
    text = unicodedata.normalize("NFKC", text).casefold().strip()
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)  # 1,000 -> 1000
    parts = [part.strip(".,;:!?\"'`()[]{}") or part for part in re.split(r"[\s/]+", text) if part]
    return [_NUMBERS.get(part, part) for part in parts if part not in ("a", "an", "the", ".", ",")]


def options(question: str) -> dict[str, str]:
    """The lettered options that a question offers, "(A) red (B) blue" or "A. red": letter -> text."""
    found = {bracketed or plain: text.strip() for bracketed, plain, text in _OPTION.findall(question)}
    # Only an unbroken run from A is a list of options; "Plan B: ..." is not.
    return found if len(found) >= 2 and sorted(found) == [chr(65 + place) for place in range(len(found))] else {}


def chosen_option(answer: str, offered: Mapping[str, str]) -> str | None:
    """The offered letter that an answer settles on, or ``None``: never a guess from a stray letter."""
    text = answer.strip()
    if (alone := _LETTER.fullmatch(text)) and alone[1].upper() in offered:
        return alone[1].upper()
    said = [bracketed or plain for bracketed, plain in _SAID.findall(text)]
    if said:
        return said[-1] if said[-1] in offered else None
    spelled = words(text)
    for letter, option in offered.items():
        if spelled in (words(option), [letter.lower(), *words(option)]):
            return letter
    return None


def _number(parts: Sequence[str]) -> tuple[float, str] | None:
    found = _NUMBER.fullmatch(" ".join(parts))
    return (float(found[2]), found[1] + found[3]) if found else None


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
    if wanted_number := _number(wanted_words):
        number = _number(said)
        if number is None:
            return 0.0
        units = {unit for unit in (number[1], wanted_number[1]) if unit}
        return float(math.isclose(number[0], wanted_number[0], rel_tol=1e-9) and len(units) < 2)
    if wanted_words in (["yes"], ["no"]):
        return float(said[0] == wanted_words[0])
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


@FILTERS.register_module()
class CorrectnessFilter:
    """Keep what the teacher answers correctly; the score is ``match_score``.

    Args:
        minimum: the score that counts as correct. 1 asks for equal answers; lower it where answers are sentences.
    """

    def __init__(self, minimum: float = 1.0) -> None:
        self.minimum = _share(minimum)

    def __call__(self, sample: Sample, trace: Trace) -> tuple[bool, float]:
        score = match_score(trace.answer, sample.answer, sample.question)
        return score >= self.minimum, score


@FILTERS.register_module()
class AlignmentFilter:
    """Keep samples with at least ``minimum`` of the gaze inside the ground-truth boxes; the score is that share.

    Args:
        minimum: the paper's 0.2.
        top_k: sparsify the map first; ``None`` takes it as stored.
        without_boxes: what becomes of a sample that has no boxes: 'fail', 'pass' (score NaN both) or 'error'.
    """

    def __init__(
        self, minimum: float = 0.2, top_k: int | None = None, without_boxes: Literal["fail", "pass", "error"] = "fail"
    ) -> None:
        if without_boxes not in ("fail", "pass", "error"):
            raise UserError(f"without_boxes is {without_boxes!r}; allowed: fail, pass, error")
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k is at least 1 or none, got {top_k}")
        self.minimum, self.top_k, self.without_boxes = _share(minimum), top_k, without_boxes

    def __call__(self, sample: Sample, trace: Trace) -> tuple[bool, float]:
        if not sample.boxes:
            if self.without_boxes == "error":
                raise UserError(f"sample '{sample.id}' has no boxes to align the gaze with")
            return self.without_boxes == "pass", math.nan
        gaze = trace.gaze.double()
        if self.top_k is not None:
            gaze = top_k(gaze, self.top_k)
        if not bool(gaze.sum() > 0):
            return False, 0.0  # a flat map looks nowhere
        mask = sample_mask(sample.boxes, trace.tiles, gaze.dtype)
        score = float(in_box_mass(gaze, mask))
        return score >= self.minimum, score


@FILTERS.register_module()
class DifficultyFilter:
    """Keep what a text-only model does not answer; the score is that model's ``match_score``.

    Args:
        answers: sample id -> the answer given without the image, or the path of a JSON file with that object.
        minimum: the score that counts as answered without the image.
    """

    def __init__(self, answers: dict[str, str] | str, minimum: float = 1.0) -> None:
        self.minimum = _share(minimum)
        self.answers: Mapping[str, str] = _read_answers(Path(answers)) if isinstance(answers, str) else answers

    def __call__(self, sample: Sample, trace: Trace) -> tuple[bool, float]:
        if sample.id not in self.answers:
            raise UserError(f"there is no text-only answer to sample '{sample.id}'")
        score = match_score(self.answers[sample.id], sample.answer, sample.question)
        return score < self.minimum, score


def _read_answers(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the text-only answers '{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"the text-only answers '{path}' are not valid JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise UserError(f"the text-only answers '{path}' are not an object of sample id -> answer")
    return content


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"minimum is a share between 0 and 1, got {value}")
    return float(value)


def judge(store: TraceStore, samples: Iterable[Sample], name: str, judgement: Filter) -> int:
    """Run one filter over all traces of a store and write its column; returns how many samples pass.

    Samples without a trace are left out; a trace without its sample is a ``UserError``.
    """
    results = {sample.id: judgement(sample, store.get(sample.id)) for sample in samples if sample.id in store}
    verdicts = {key: verdict for key, (verdict, _) in results.items()}
    store.write_verdicts(name, verdicts, {key: score for key, (_, score) in results.items()})
    return sum(verdicts.values())
