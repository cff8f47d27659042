"""The functions behind eval/tasks/paper/*.yaml and eval/tasks/lmms/*.yaml.

The protocol ``paper``: the images, then the question, its options by letter, one instruction; the answer is read by
the one extractor of the project (``laavit/traces/matching.py``) among the offered options, else it is none. What is
known of the paper's protocol and what is an assumption stands in ``eval/README.md``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from lmms_eval.tasks.hallusion_bench.evaluate_hb import hb_process_results

from laavit.registry import UserError
from laavit.traces.matching import chosen_option, options, polar

BY_LETTER = "Answer with the option's letter from the given choices directly."
BY_POLARITY = "Answer with yes or no directly."
_INSTRUCTION = re.compile(r"\s*Answer with the option's letter from the given choices directly\.?\s*\Z", re.I)
_BRACKETED = re.compile(r"\(([A-Z])\)\s*(.*?)\s*(?=\([A-Z]\)|\Z)", re.S | re.I)
_LISTED = re.compile(r"(?:\A|,?\s+)([A-Z]):\s*(.*?)\s*(?=,?\s+[A-Z]:\s|\Z)", re.S)


@dataclass(frozen=True)
class Question:
    """A question as it is asked: its text with the options in it, what they are (none: yes or no), the right answer."""

    text: str
    target: str
    offered: Mapping[str, str] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        return f"{self.text}\n{BY_LETTER if self.offered else BY_POLARITY}"

    def read(self, answer: str) -> str | None:
        """The letter that an answer settles on, or yes or no; None where it settles on none."""
        return chosen_option(answer, self.offered) if self.offered else polar(answer)


def _listed(question: str, texts: Mapping[str, str], target: str) -> Question:
    lines = [question.strip(), *(f"{letter}. {text}" for letter, text in texts.items())]
    return Question("\n".join(lines), target.strip("() \n").upper(), texts)


def _lettered(found: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Letter -> text of options that run from A without a break, else {}."""
    texts = {letter.upper(): text.strip().rstrip(",") for letter, text in found}
    return texts if list(texts) == [chr(65 + place) for place in range(len(texts))] else {}


def _mmvp(doc: Mapping[str, Any]) -> Question:
    return _listed(doc["Question"], _lettered(_BRACKETED.findall(doc["Options"])), doc["Correct Answer"])


def _vstar(doc: Mapping[str, Any]) -> Question:
    text = _INSTRUCTION.sub("", doc["text"])  # the published text holds it already
    texts = _lettered(_BRACKETED.findall(text))
    return _listed(text.partition("(A)")[0], texts, doc["label"])


def _prompted(doc: Mapping[str, Any]) -> Question:
    """BLINK and CV-Bench: the benchmark's own prompt, which lists its options."""
    texts = {chr(65 + place): text for place, text in enumerate(doc["choices"])}
    return Question(doc["prompt"].strip(), doc["answer"].strip("()"), texts)


def _mmstar(doc: Mapping[str, Any]) -> Question:
    question, word, listed = doc["question"].strip().rpartition("Options:")
    answer = doc["answer"].strip()
    if word and answer in (texts := _lettered(_LISTED.findall(listed.strip()))):
        return _listed(question, texts, answer)
    # questions in another form stay as they are published; letters alone are read where the options cannot be
    texts = options(doc["question"])
    return Question(doc["question"].strip(), answer, texts if answer in texts else dict.fromkeys("ABCD", ""))


def _hallusion(doc: Mapping[str, Any]) -> Question:
    return Question(doc["question"].strip(), "yes" if str(doc["gt_answer"]) == "1" else "no")


def _pope(doc: Mapping[str, Any]) -> Question:
    return Question(doc["question"].strip(), doc["answer"].strip().lower())


#: The columns that tell one published schema from the others -> how its questions are read; the first that fits.
SCHEMAS: tuple[tuple[frozenset[str], Callable[[Mapping[str, Any]], Question]], ...] = (
    (frozenset({"Question", "Options", "Correct Answer"}), _mmvp),
    (frozenset({"text", "label", "category"}), _vstar),
    (frozenset({"prompt", "choices", "answer"}), _prompted),
    (frozenset({"question", "answer", "l2_category"}), _mmstar),
    (frozenset({"question", "gt_answer", "figure_id"}), _hallusion),
    (frozenset({"question", "answer", "image_source"}), _pope),
)


def question_of(doc: Mapping[str, Any]) -> Question:
    """A document of any of the benchmarks.

    Raises:
        UserError: its columns are none of theirs, or the right answer is none of those that it offers.
    """
    for columns, reader in SCHEMAS:
        if columns <= doc.keys():
            question = reader(doc)
            offered = list(question.offered) or ["yes", "no"]
            if question.target not in offered:  # every answer would be wrong
                raise UserError(
                    f"the answer {question.target!r} is none of {', '.join(offered)}, "
                    f"which are offered by {question.text!r}"
                )
            return question
    raise UserError(f"a question has the columns {', '.join(doc)}, which are no benchmark's (eval/README.md)")


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """All of a question's images in order, as RGB."""
    names = ["image"] if "image" in doc else sorted(name for name in doc if re.fullmatch(r"image_\d+", name))
    return [doc[name].convert("RGB") for name in names if doc[name] is not None]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question, its options, the instruction."""
    return question_of(doc).prompt


def doc_to_messages(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> list[dict]:
    """One user turn, the images before the question."""
    content = [{"type": "image", "url": image} for image in doc_to_visual(doc)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc_to_text(doc)}]}]


def doc_to_target(doc: dict[str, Any]) -> str:
    """The right letter, or yes or no."""
    return question_of(doc).target


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """``accuracy``: what was read in the answer, and whether it is the right one."""
    question = question_of(doc)
    read = question.read(results[0])
    return {"accuracy": {"is_correct": read == question.target, "read": read}}


def accuracy(results: list[dict[str, Any]]) -> float:
    """Micro: right answers / questions, a share of 1; other figures come from the records (``scores.py``)."""
    return sum(result["is_correct"] for result in results) / len(results)


def direct_attributes(documents: Dataset) -> Dataset:
    """V*'s questions for an attribute."""
    return documents.filter(lambda value: value == "direct_attributes", input_columns="category")


def relative_position(documents: Dataset) -> Dataset:
    """V*'s questions for a position."""
    return documents.filter(lambda value: value == "relative_position", input_columns="category")


def hallusion_rules(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """lmms-eval's HallusionBench sample with the verdict of its own rule (``hb_aggregation_result_intern``): an answer
    with "yes" in it is yes, any other is no. Its aggregates with GPT-4 as the judge are left out: they need a network.
    """
    read = "yes" if "yes" in results[0].lower() else "no"
    right = (read == "yes") == (doc["gt_answer"] == "1")
    return {
        name: {**sample, "read": read, "is_correct": right} for name, sample in hb_process_results(doc, results).items()
    }
