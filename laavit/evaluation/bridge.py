"""The lmms-eval model ``laavit``: an exported student, or any Hugging Face vision-language checkpoint, asked by tasks.

What answers is ``laavit/evaluation/generation.py``; here are lmms-eval's requests: which are answered together, what
they show, and what is kept of them.

Plain use: ``lmms-eval --model laavit --model_args pretrained=FOLDER,latents=off --tasks … --include_path eval/tasks``.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from laavit.evaluation.batching import batches, prompt_lengths
from laavit.evaluation.generation import Answerer, Settings, read_export
from laavit.evaluation.interventions import Chat, Question, Questions
from laavit.registry import UserError

__all__ = ["Laavit", "Settings", "read_export"]

logger = logging.getLogger(__name__)


class Progressed(Protocol):
    """Called with the number of requests just answered."""

    def __call__(self, count: int) -> None: ...


class Laavit(Answerer, lmms):
    """A vision-language checkpoint under lmms-eval.

    Args:
        pretrained: a folder (an export, or any checkpoint of ``AutoModelForImageTextToText``) or a hub name.
        batch_size: prompts a forward pass. max_batch_size: accepted from lmms-eval, not used.
        max_new_tokens: for tasks that set none.
        system: the system prompt, or a file that holds it.
        settings: the rest are ``Answerer``'s: device, dtype, latents, attention, min_pixels, max_pixels, intervention,
            imports, image_cache_mb, feature_cache_mb.

    Raises:
        UserError: an argument is not allowed, the model cannot be loaded, or it has no latents to mask.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_new_tokens: int = 128,
        system: str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        lmms.__init__(self)
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size} was given; allowed: whole numbers from 1")
        if system is not None:
            system = self._resolve_system_prompt(system)
        Answerer.__init__(self, pretrained, system=system, **settings)
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.batch_size = int(batch_size)
        self.max_new_tokens = int(max_new_tokens)
        #: (task, doc id) -> seconds of generation, a batch's time shared out evenly.
        self.seconds: dict[tuple[str, Any], float] = {}
        #: (task, doc id) -> how many latents the model wrote before its answer, where it emits them.
        self.written: dict[tuple[str, Any], int] = {}
        self.console = Console(stderr=True)

    # -- what lmms-eval calls

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One greedy answer a request, in the order of the requests, whatever order they were generated in."""
        answers: list[GenerationResult | None] = [None] * len(requests)
        with self._progress(len(requests)) as advance:
            for indices, shared in self._batches(requests):
                started = time.perf_counter()
                questions = [self._question(requests[i]) for i in indices]
                chats = [question.chat for question in questions]
                for i, (answer, written) in zip(indices, self.answer_and_count(chats, shared, questions)):
                    answers[i] = answer
                    if self.layout.emitted:
                        self.written[requests[i].task_name, requests[i].doc_id] = written
                share = (time.perf_counter() - started) / len(indices)
                self.seconds.update({(requests[i].task_name, requests[i].doc_id): share for i in indices})
                advance(len(indices))
        without = sum(count == 0 for count in self.written.values())
        if without and not self.silenced:
            logger.warning("%d of %d answers came without latents, which this model is to write", without, len(answers))
        return [answer for answer in answers if answer is not None]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: every task of ours asks once."""
        raise UserError(f"task '{requests[0].task_name}' asks in several rounds; the model laavit answers single ones")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: answers are generated, never scored."""
        raise UserError(f"task '{requests[0].task_name}' scores continuations; the model laavit generates answers")

    def clean(self) -> None:
        """What lmms-eval calls after the last answer: caches go, the model stays for who else asks it."""
        if self.features is not None:
            self.features.clear()

    # -- the pieces

    def questions(self, requests: Sequence[Instance]) -> Iterator[list[Question]]:
        """The questions of requests, in the batches in which they are answered."""
        for indices, _ in self._batches(requests):
            yield [self._question(requests[i]) for i in indices]

    def _batches(self, requests: Sequence[Instance]) -> Iterator[tuple[list[int], Settings]]:
        settings = [self._settings(request.args[2]) for request in requests]
        return batches(settings, prompt_lengths(requests, self.task_dict, self.processor), self.batch_size)

    def _question(self, request: Instance) -> Question:
        _, doc_to_messages, _, doc_id, task, split = request.args
        documents = self.task_dict[task][split]

        def make(number: int) -> tuple[Mapping[str, Any], Chat]:
            document = documents[number]
            messages = ChatMessages(messages=doc_to_messages(document))
            _, videos, audios = messages.extract_media()
            if videos or audios:
                raise UserError(f"task '{task}' shows video or audio; the model laavit reads images")
            return document, messages.to_hf_messages()

        return Questions(request.task_name, documents, make)[doc_id]

    def _settings(self, given: Mapping[str, Any]) -> Settings:
        if given.get("do_sample") or int(given.get("num_beams") or 1) > 1:
            logger.warning("the task asks for sampling or beams (%s); the model laavit decodes greedily", dict(given))
        until = given.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        return Settings(int(given.get("max_new_tokens") or self.max_new_tokens), tuple(stop for stop in stops if stop))

    @contextmanager
    def _progress(self, total: int) -> Iterator[Progressed]:
        """A progress bar on a terminal, on the first rank."""
        columns = (
            TextColumn("answering"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        shown = self.rank == 0 and self.console.is_terminal
        with Progress(*columns, console=self.console, disable=not shown) as progress:
            task = progress.add_task("answering", total=total)
            yield lambda count: progress.advance(task, count)
