"""Judges: whether an answer means the same as the ground truth, where the words do not match.

A judge takes questions and gives each a verdict with the figure behind it; it is named in ``registry/judges``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from laavit.recipe import checked, resolve, zoo_path
from laavit.registry import JUDGES, UserError

PROMPT = """Question: {question}
Reference answer: {target}
Given answer: {answer}
Does the given answer mean the same as the reference answer? Reply with one word, {yes} or {no}."""


class Question(NamedTuple):
    """What a judge sees: the question, the ground truth, and the answer to be judged."""

    question: str
    target: str
    answer: str


class Judge(Protocol):
    """Verdict and figure (a probability, for example) of each question, in order."""

    def __call__(self, questions: Sequence[Question]) -> list[tuple[bool, float]]: ...


def build_judge(spec: str | dict[str, Any]) -> Judge:
    """A judge from its name in ``registry/judges``, or from ``dict(name=..., arguments)``.

    Raises:
        UserError: no such judge, or arguments that it does not take.
    """
    resolved = resolve("judge", "judges", spec)
    cls = JUDGES.find(resolved.pop("type"))
    return cls(**checked("judge", cls, resolved))


@JUDGES.register_module()
class LMJudge:
    """Any Hugging Face causal language model, asked yes or no; the figure is P(yes) against P(no) at the first token.

    No text is generated: the logits of the two words (capitalised or not, with a space before or not) decide.

    Args:
        path: folder or hub name of a causal language model.
        minimum: the probability of yes that counts as the same answer.
        prompt: with the fields {question}, {target}, {answer}, {yes}, {no}; it goes through the model's chat template
            where there is one.
        yes, no: the two words.
        batch_size: prompts a forward. dtype: of the weights. device: 'auto' takes a GPU where there is one.

    Raises:
        UserError: the two words begin with the same token, or the prompt has other fields.
    """

    def __init__(
        self,
        path: str,
        minimum: float = 0.5,
        prompt: str = PROMPT,
        yes: str = "yes",
        no: str = "no",
        batch_size: int = 16,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        if not 0 <= minimum <= 1:
            raise UserError(f"judge.minimum is a share between 0 and 1, got {minimum}")
        if batch_size < 1:
            raise UserError(f"judge.batch_size: at least 1, got {batch_size}")
        try:
            prompt.format(question="", target="", answer="", yes=yes, no=no)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(f"judge.prompt: {error!r}; allowed fields: question, target, answer, yes, no") from error
        self.path, self.minimum, self.prompt, self.yes, self.no = path, minimum, prompt, yes, no
        self.batch_size, self.dtype = batch_size, dtype
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._loaded: tuple[Any, Any, Tensor, Tensor] | None = None

    def _load(self) -> tuple[Any, Any, Tensor, Tensor]:
        """Model, tokenizer and the tokens of the two words; loaded at the first question."""
        if self._loaded is None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            folder = zoo_path(self.path)
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder)
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype)
            except (OSError, ValueError) as error:
                line = str(error).strip().splitlines()[0]
                raise UserError(
                    f"judge.path: '{self.path}' cannot be loaded as a causal language model: {line}"
                ) from error
            yes, no = (self._first_tokens(tokenizer, word) for word in (self.yes, self.no))
            if yes & no or not yes or not no:
                raise UserError(
                    f"judge: '{self.yes}' and '{self.no}' are told apart by no first token of '{self.path}'"
                )
            model = model.eval().requires_grad_(False).to(self.device)
            self._loaded = model, tokenizer, torch.tensor(sorted(yes)), torch.tensor(sorted(no))
        return self._loaded

    @staticmethod
    def _first_tokens(tokenizer: Any, word: str) -> set[int]:
        forms = [space + form for space in ("", " ") for form in (word, word.capitalize())]
        # A bare space before a word may be a token of its own; it says nothing about the word.
        found = [tokenizer.encode(form, add_special_tokens=False) for form in forms]
        return {ids[0] for ids in found if ids and tokenizer.decode(ids[:1]).strip()}

    def _encode(self, tokenizer: Any, question: Question) -> list[int]:
        text = self.prompt.format(**question._asdict(), yes=self.yes, no=self.no)
        if not tokenizer.chat_template:
            return list(tokenizer.encode(text))
        turn = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False))

    @torch.no_grad()
    def __call__(self, questions: Sequence[Question]) -> list[tuple[bool, float]]:
        model, tokenizer, yes, no = self._load()
        prompts = [self._encode(tokenizer, question) for question in questions]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: dict[int, float] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            logits = _last_logits(model, [prompts[i] for i in chosen], self.device).cpu().double()
            sums = torch.stack([logits[:, ids].logsumexp(-1) for ids in (yes, no)], -1)
            found |= dict(zip(chosen, sums.softmax(-1)[:, 0].tolist(), strict=True))
        return [(found[i] >= self.minimum, found[i]) for i in range(len(prompts))]


def _last_logits(model: Any, prompts: Sequence[Sequence[int]], device: str) -> Tensor:
    """The logits after each prompt: [B, V]. Padded on the right, which no causal model looks at."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    last, place = torch.unique(lengths - 1, return_inverse=True)
    keep: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:  # a wide vocabulary at few positions only
        keep["logits_to_keep"] = last.to(device)
    else:
        place = lengths - 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **keep).logits
    return logits[torch.arange(len(prompts)), place.to(logits.device)]
