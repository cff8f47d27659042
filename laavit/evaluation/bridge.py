"""The lmms-eval model ``laavit``: an exported student, or any Hugging Face vision-language checkpoint, asked by tasks.

What answers is ``laavit/evaluation/generation.py``; here are lmms-eval's requests: which are answered together, what
they show, and what is kept of them.

Plain use: ``lmms-eval --model laavit --model_args pretrained=FOLDER,latents=off --tasks … --include_path eval/tasks``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import distributed

from laavit.evaluation.batching import batches, prompt_lengths
from laavit.evaluation.generation import Answerer, Settings, read_export
from laavit.evaluation.interventions import Chat, Question, Questions
from laavit.evaluation.journal import Answer, Journal, drop, question_key
from laavit.evaluation.records import weights_sha256
from laavit.registry import UserError

__all__ = ["Laavit", "Settings", "leave", "read_export"]

logger = logging.getLogger(__name__)

#: arguments that the answers hang on
GIVEN = ("latents", "intervention", "attention", "min_pixels", "max_pixels")


def leave() -> None:
    """End the talk between processes once all have come here; a process that exits amidst it may be aborted."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


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
        journal: a folder for finished answers, from which the same command goes on after a kill. fresh: drop those that
            are there.
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
        journal: str | None = None,
        fresh: bool | str = False,
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
        if self._world_size > 1:  # lmms-eval gathers the ranks' answers with it
            self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        #: what the answers hang on beside the weights, as it was given
        self.given = {"latents": "on", "attention": "sdpa", **settings}
        self.pretrained = str(pretrained)
        #: where finished answers are kept; None keeps none
        self.journal: Journal | None = None
        self.batch_size = int(batch_size)
        self.max_new_tokens = int(max_new_tokens)
        if journal is not None:
            self.open_journal(journal, fresh=fresh in (True, "True"))
        #: (task, doc id) -> seconds of generation, a batch's time shared out evenly.
        self.seconds: dict[tuple[str, Any], float] = {}
        #: (task, doc id) -> how many latents the model wrote before its answer, where it emits them.
        self.written: dict[tuple[str, Any], int] = {}
        self.console = Console(stderr=True)

    def open_journal(self, folder: str | Path, protocol: str = "lmms", fresh: bool = False) -> None:
        """Go on from the answers that an unfinished evaluation left in a folder, and keep new ones there.

        Args:
            protocol: by which the tasks ask. fresh: drop what is there, and ask everything.

        Raises:
            UserError: the answers there are of another model or were asked for in another way.
        """
        if fresh and self.rank == 0:
            drop(folder)
        if self.world_size > 1:
            self.accelerator.wait_for_everyone()  # nobody reads what is about to be dropped
        self.journal = Journal(folder, self._about(protocol), self.rank)

    def _about(self, protocol: str) -> dict[str, Any]:
        """What all answers have in common, as plain data."""
        config = {name: value for name, value in self.model.config.to_dict().items() if name != "_name_or_path"}
        reading = [self.processor.image_processor.to_dict(), self.processor.chat_template, config]
        words = getattr(self.tokenizer, "backend_tokenizer", None)
        reading += [self.model.generation_config.to_dict(), words.to_str() if words else self.tokenizer.get_vocab()]
        known = weights_sha256(self.pretrained) or getattr(self.model.config, "_commit_hash", None)
        return {
            "weights": known or self.pretrained,
            "protocol": protocol,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "system": self.system,
            "processor": hashlib.sha256(json.dumps(reading, sort_keys=True, default=str).encode()).hexdigest(),
            "versions": {name: metadata.version(name) for name in ("laavit", "torch", "transformers", "lmms_eval")},
            **{name: self.given.get(name) for name in GIVEN},
            "latents": str(self.given["latents"]),  # a number from a command line is a word
        }

    # -- what lmms-eval calls

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One greedy answer a request, in the order of the requests, whatever order they were generated in."""
        places: dict[tuple[str, int], list[int]] = {}  # lmms-eval fills up a rank's share with copies
        for place, request in enumerate(requests):
            places.setdefault((request.task_name, request.doc_id), []).append(place)
        once = [requests[same[0]] for same in places.values()]
        answers: list[GenerationResult | None] = [None] * len(requests)
        with self._progress(len(once)) as advance:
            for indices, settings in self._batches(once):
                for answer in self._answered([self._question(once[i]) for i in indices], settings):
                    counts = TokenCounts(input_tokens=answer.prompt, output_tokens=answer.tokens)
                    for place in places[answer.task, answer.number]:
                        answers[place] = GenerationResult(answer.text, counts)
                advance(len(indices))
        if self.journal is not None:
            self.journal.close()
        without = sum(count == 0 for count in self.written.values())
        if without and not self.silenced:
            logger.warning("%d of %d answers came without latents, which this model is to write", without, len(once))
        return [answer for answer in answers if answer is not None]

    def _answered(self, questions: Sequence[Question], settings: Settings) -> list[Answer]:
        """A batch's answers: those of the journal, and the model's to all other questions."""
        keys = [""] * len(questions)
        found: list[Answer | None] = [None] * len(questions)
        with self.images.unchanging():
            if self.journal is not None:
                keys = [question_key(one.chat, astuple(settings), self.images.digest) for one in questions]
                found = [self.journal.get(*one.key, key) for one, key in zip(questions, keys, strict=True)]
            open_ = [place for place, answer in enumerate(found) if answer is None]
            if open_:
                started = time.perf_counter()
                asked = [questions[place] for place in open_]
                said = self.answer_and_count([one.chat for one in asked], settings, asked)
                share = (time.perf_counter() - started) / len(open_)
                for place, (text, latents) in zip(open_, said, strict=True):
                    counts = text.token_counts.input_tokens, text.token_counts.output_tokens
                    found[place] = Answer(*questions[place].key, keys[place], text.text, *counts, latents, share)
        answers = [answer for answer in found if answer is not None]
        if self.journal is not None and open_:
            self.journal.add(answers[place] for place in open_)
        for answer in answers:
            self.seconds[answer.task, answer.number] = answer.seconds
            if self.layout.emitted:
                self.written[answer.task, answer.number] = answer.latents
        return answers

    def gather(self) -> None:
        """Let the first rank know all ranks' ``seconds`` and ``written``; every rank has to come here."""
        if self.world_size == 1:
            return
        parts: list[Any] = [None] * self.world_size
        distributed.gather_object((self.seconds, self.written), parts if self.rank == 0 else None, dst=0)
        for seconds, written in filter(None, parts):
            self.seconds |= seconds
            self.written |= written

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
