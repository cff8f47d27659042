"""The three filters of LaViT-SFT-15K (arXiv 2601.10129): correctness, difficulty, alignment.

A filter is called with a sample and its trace and answers ``(verdict, score)``: whether the sample is kept, and the
figure behind it. Verdicts become columns of the trace store (``judging.py``); nothing is deleted, a recipe selects.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from laavit.registry import FILTERS, UserError
from laavit.structures import Sample, Trace
from laavit.traces.gaze import top_k
from laavit.traces.grids import in_box_mass, sample_mask
from laavit.traces.judges import Judge, Question, build_judge
from laavit.traces.matching import match_score

#: How maps may be stored for shares of them to be shares of the attention (``extract.normalisation``).
TRUE_SHARES = ("none", "distribution")

#: A filter may also have ``check(header, ids)``, which refuses a store that it cannot judge before the work begins, and
#: ``many(pairs)``, which judges several at once and may add notes.
Filter = Callable[[Sample, Trace], tuple[bool, float]]


@dataclass(frozen=True)
class Judgement:
    """A verdict with its figure, and further columns: what is noted as ``NAME.note`` beside the filter's own column."""

    verdict: bool
    score: float
    notes: Mapping[str, tuple[bool, float]] = field(default_factory=dict)


@FILTERS.register_module()
class CorrectnessFilter:
    """Keep what the teacher answers correctly; the score is ``match_score``.

    Args:
        minimum: the score that counts as correct. 1 asks for equal answers; lower it where answers are sentences.
        judge: asked about answers that do not match (a score below 1): a name in registry/judges, or
            dict(name='lm', path=...). Its own verdicts and figures become the column NAME.judge, where an answer that
            it was not asked about has the score NaN.
    """

    def __init__(self, minimum: float = 1.0, judge: str | dict[str, Any] | None = None) -> None:
        self.minimum = _share(minimum)
        self.judge: Judge | None = None if judge is None else build_judge(judge)

    def check(self, header: Mapping[str, Any], ids: Sequence[str] = ()) -> None:
        """Refuse a store (its header) whose answers are not the teacher's own: a static encoder's, or gold ones."""
        if header.get("static"):
            raise UserError("the traces are a static encoder's, which gives no answer that could be wrong")
        if header.get("settings", {}).get("answer") == "gold":
            raise UserError("the traces carry the gold answers (extract.answer gold), which cannot be wrong")

    def __call__(self, sample: Sample, trace: Trace) -> tuple[bool, float]:
        judgement = self.many([(sample, trace)])[0]
        return judgement.verdict, judgement.score

    def many(self, pairs: Sequence[tuple[Sample, Trace]]) -> list[Judgement]:
        """Judge several; the judge sees the unmatched ones together."""
        scores = [match_score(trace.answer, sample.answer, sample.question) for sample, trace in pairs]
        if self.judge is None:
            return [Judgement(score >= self.minimum, score) for score in scores]
        open_ = [i for i, score in enumerate(scores) if score < 1]
        questions = [Question(pairs[i][0].question, pairs[i][0].answer, pairs[i][1].answer) for i in open_]
        said = dict(zip(open_, self.judge(questions) if questions else [], strict=True))
        judgements = []
        for i, score in enumerate(scores):
            verdict, figure = said.get(i, (True, math.nan))
            judgements.append(Judgement(score >= self.minimum or verdict, score, {"judge": (verdict, figure)}))
        return judgements


@FILTERS.register_module()
class AlignmentFilter:
    """Keep samples with at least ``minimum`` of the gaze inside the ground-truth boxes; the score is that share.

    The paper's share is of the whole aggregated attention, so the stored maps must be raw and whole: a store that keeps
    the k strongest tokens alone, or scaled maps, is refused unless ``top_k`` or ``any_scale`` says that this is meant.

    Args:
        minimum: the paper's 0.2.
        top_k: sparsify the map first; ``None`` takes it as stored.
        without_boxes: what becomes of a sample that has no boxes: 'fail', 'pass' (score NaN both) or 'error'.
        any_scale: take maps that the extraction has normalised for what they are.
    """

    def __init__(
        self,
        minimum: float = 0.2,
        top_k: int | None = None,
        without_boxes: Literal["fail", "pass", "error"] = "fail",
        any_scale: bool = False,
    ) -> None:
        if without_boxes not in ("fail", "pass", "error"):
            raise UserError(f"without_boxes is {without_boxes!r}; allowed: fail, pass, error")
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k is at least 1 or none, got {top_k}")
        self.minimum, self.top_k, self.without_boxes = _share(minimum), top_k, without_boxes
        self.any_scale = any_scale

    def check(self, header: Mapping[str, Any], ids: Sequence[str] = ()) -> None:
        """Refuse a store (its header) in which a map's share in the boxes is another figure than is asked for."""
        kept = header.get("gaze_top_k")
        if kept is not None and (self.top_k is None or self.top_k > kept):
            raise UserError(
                f"the store keeps the {kept} strongest tokens of a map, whose share in the boxes is not "
                f"that of the whole gaze; judge the {kept} with the filter's top_k={kept}, or extract with "
                "extract.gaze_top_k null"
            )
        scale = header.get("settings", {}).get("normalisation", "none")
        if scale not in TRUE_SHARES and not self.any_scale:
            raise UserError(
                f"the store holds maps normalised by '{scale}', whose share in the boxes is not that of "
                "the attention; extract with extract.normalisation none, or set the filter's any_scale"
            )

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
    """Keep what is not answered without the image; the score is the blind answer's ``match_score``.

    Args:
        answers: None takes the blind answers that the extraction has recorded (``extract.blind``). Or sample id -> the
            answer given without the image, or the path of a JSON file with that object.
        minimum: the score that counts as answered without the image.
    """

    def __init__(self, answers: dict[str, str] | str | None = None, minimum: float = 1.0) -> None:
        self.minimum = _share(minimum)
        self.answers: Mapping[str, str] | None = _read_answers(Path(answers)) if isinstance(answers, str) else answers

    def check(self, header: Mapping[str, Any], ids: Sequence[str] = ()) -> None:
        """Refuse a store (its header) without blind answers, or answers that do not cover its ids."""
        if self.answers is None:
            if header.get("settings", {}).get("blind") is None:
                raise UserError(
                    "the store holds no answers given without the image: extract with extract.blind "
                    "(teacher, or a text-only model), or give the difficulty filter's 'answers', a JSON file"
                )
            return
        missing = [key for key in ids if key not in self.answers]
        if missing:
            raise UserError(f"there is no text-only answer to sample '{missing[0]}' ({len(missing)} missing in all)")

    def __call__(self, sample: Sample, trace: Trace) -> tuple[bool, float]:
        answer = trace.blind_answer if self.answers is None else self.answers.get(sample.id)
        if answer is None:
            raise UserError(f"there is no text-only answer to sample '{sample.id}'")
        score = match_score(answer, sample.answer, sample.question)
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
