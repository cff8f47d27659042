"""The lmms-eval model ``laavit``: an exported student, or any Hugging Face vision-language checkpoint.

An export's chat template writes ``<|latent_1|> … <|latent_K|><|latent_end|>`` after the generation prompt, so the model
is driven exactly as any other: template, processor, ``generate``. What is added here are interventions on what it is
given; ``latents=off`` is one, the ablation "without latent tokens (masked at inference)" of LaViT (arXiv 2601.10129,
Table 3). A student that emits its latents writes them before its answer: they cost the answer none of its tokens, are
no part of its text, and are counted, so that latents that silently stay away are seen.

Plain use: ``lmms-eval --model laavit --model_args pretrained=FOLDER,latents=off --tasks … --include_path eval/tasks``.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from laavit.backbones.base import Backbone
from laavit.backbones.chat import ORDERS, text_settings
from laavit.backbones.unrolling import fed_back
from laavit.custom import import_custom
from laavit.evaluation.images import CachedImages, images_of
from laavit.evaluation.interventions import latent_ids
from laavit.files import read_object
from laavit.latents import SEPARATOR, LatentLayout, latent_tokens, layout_of
from laavit.paths import EXPORT_CARD
from laavit.recipe import build_part, cards
from laavit.registry import INTERVENTIONS, UserError, nearest

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
SWITCH = ("on", "off")


@dataclass(frozen=True)
class Settings:
    """How one group of requests is generated: greedily, up to ``max_new_tokens``, cut at the first of ``until``."""

    max_new_tokens: int
    until: tuple[str, ...]


class Progressed(Protocol):
    """Called with the number of requests just answered."""

    def __call__(self, count: int) -> None: ...


class Laavit(lmms):
    """A vision-language checkpoint under lmms-eval: batched, left-padded, greedy, deterministic.

    Args:
        pretrained: a folder (an export, or any checkpoint of ``AutoModelForImageTextToText``) or a hub name.
        batch_size: prompts a forward pass. max_batch_size: accepted from lmms-eval, not used.
        device: 'cpu', 'cuda', 'cuda:1', …; by default a GPU where there is one (one a rank).
        dtype: 'auto' (as stored), 'float32', 'bfloat16' or 'float16'.
        latents: 'on', or 'off': latents in the prompt are masked (the intervention 'latents_off'), emitted ones are
            forbidden, with their separator. A number N: that many in the prompt, of a student whose prompt holds them.
        intervention: a name in registry/interventions or a registered class, or dict(name= or type=..., arguments).
        imports: modules and ``.py`` files that register interventions of the user's own; they are executed.
        system: the system prompt, or a file that holds it; by default what the export stores in ``laavit.json``, and
            without one the chat template's own.
        attention: the attention implementation of transformers.
        max_new_tokens: for tasks that set none.
        min_pixels, max_pixels: overrides of the image processor's limits.
        image_cache_mb: memory for prepared images.

    Raises:
        UserError: an argument is not allowed, the model cannot be loaded, or it has no latents to mask.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        latents: str | int = "on",
        system: str | None = None,
        attention: str = "sdpa",
        max_new_tokens: int = 128,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        image_cache_mb: int = 256,
        max_batch_size: int | None = None,
        intervention: str | Mapping[str, Any] | None = None,
        imports: str | Sequence[str] = (),
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype} was given; {nearest(dtype, DTYPES)}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size} was given; allowed: whole numbers from 1")
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.batch_size = int(batch_size)
        self.device = _device(device)
        self.export = read_export(pretrained)
        self._warn_of_other_prompts()
        self.layout, self.latents = layout_of(self.export), str(latents)
        self.count = _in_prompt(self.latents, self.layout, pretrained)
        self.intervention = _intervention(self.latents, self.layout, intervention, imports)
        self.max_new_tokens = int(max_new_tokens)
        #: (task, doc id) -> seconds of generation, a batch's time shared out evenly.
        self.seconds: dict[tuple[str, Any], float] = {}
        #: (task, doc id) -> how many latents the model wrote before its answer, where it emits them.
        self.written: dict[tuple[str, Any], int] = {}
        self.console = Console(stderr=True)
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self.model, self.processor = _load(str(pretrained), dtype, attention, limits)
        self.model.to(self.device).eval()
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        self.processor.image_processor = CachedImages(self.processor.image_processor, image_cache_mb * 2**20)
        #: what unrolls latents that are fed back; None where there are none
        self.backbone = Backbone(self.model, self.processor, self.layout) if self.layout.feedback else None
        self.system = self._resolve_system_prompt(system) if system is not None else self.export.get("system")
        self.latent_ids = latent_ids(self.tokenizer)
        if latents == "off" and not self.latent_ids:
            raise UserError(f"latents=off was given, but the tokenizer of '{pretrained}' knows no <|latent_1|>")

    def _warn_of_other_prompts(self) -> None:
        """A task orders and words its own prompts, whatever the training's were."""
        order, suffix = self.export.get("order", ORDERS[0]), self.export.get("suffix", "")
        if order != ORDERS[0]:
            logger.warning(
                "this model was trained with prompt.order '%s'; a task's prompts keep their own order", order
            )
        if suffix:
            logger.warning(
                "this model was trained with prompt.suffix %r; a task's prompts have their own words", suffix
            )

    # -- what lmms-eval calls

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One greedy answer a request, in the order of the requests, whatever order they were generated in."""
        answers: list[GenerationResult | None] = [None] * len(requests)
        with self._progress(len(requests)) as advance:
            for indices, settings in self._batches(requests):
                started = time.perf_counter()
                chats = [self._chat(requests[i]) for i in indices]
                for i, (answer, written) in zip(indices, self.answer_and_count(chats, settings)):
                    answers[i] = answer
                    if self.layout.emitted:
                        self.written[requests[i].task_name, requests[i].doc_id] = written
                share = (time.perf_counter() - started) / len(indices)
                self.seconds.update({(requests[i].task_name, requests[i].doc_id): share for i in indices})
                advance(len(indices))
        without = sum(count == 0 for count in self.written.values())
        if without and self.latents == "on":
            logger.warning("%d of %d answers came without latents, which this model is to write", without, len(answers))
        return [answer for answer in answers if answer is not None]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: every task of ours asks once."""
        raise UserError(f"task '{requests[0].task_name}' asks in several rounds; the model laavit answers single ones")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: answers are generated, never scored."""
        raise UserError(f"task '{requests[0].task_name}' scores continuations; the model laavit generates answers")

    # -- the pieces, usable without lmms-eval

    def answer(self, chats: Sequence[list[dict[str, Any]]], settings: Settings) -> list[GenerationResult]:
        """Greedy answers to Hugging Face chats (images as ``{"type": "image", "image": PIL}``), as one batch."""
        return [answer for answer, _ in self.answer_and_count(chats, settings)]

    @torch.inference_mode()
    def answer_and_count(
        self, chats: Sequence[list[dict[str, Any]]], settings: Settings
    ) -> list[tuple[GenerationResult, int]]:
        """The answers, and how many latents the model wrote for each (0 where its prompt holds them)."""
        inputs = self.encode(chats)
        if self.backbone is not None:
            inputs = fed_back(self.backbone, inputs)
        start, markup, room = inputs["input_ids"].shape[1], self._markup, self.layout.written
        forbidden: dict[str, Any] = {}
        if markup and self.latents == "off":
            forbidden, room = {"suppress_tokens": sorted(markup)}, 0
        output = self.model.generate(
            **inputs,
            **forbidden,
            max_new_tokens=settings.max_new_tokens + room,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=self._stops,
            pad_token_id=self._pad,
        )[:, start:]
        results = []
        for tokens, prompt in zip(output.tolist(), inputs["attention_mask"].sum(1).tolist()):
            length = next((i for i, token in enumerate(tokens) if token in self._stops), len(tokens))
            latents = [token for token in tokens[:length] if token in markup]
            words = [token for token in tokens[:length] if token not in markup][: settings.max_new_tokens]
            text = self.tokenizer.decode(words, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            text = _cut(text, settings.until).lstrip()  # a family's space between the assistant's header and its words
            counts = TokenCounts(input_tokens=prompt, output_tokens=len(latents) + len(words))
            results.append((GenerationResult(text, counts), sum(token in self.latent_ids for token in latents)))
        return results

    @property
    def _markup(self) -> set[int]:
        """Ids of latents and separator, where the model writes them itself."""
        return {*self.latent_ids, self.tokenizer.convert_tokens_to_ids(SEPARATOR)} if self.layout.emitted else set()

    def encode(self, chats: Sequence[list[dict[str, Any]]]) -> dict[str, Tensor]:
        """What ``generate`` is given for these chats, on the device; latents masked where that was asked for."""
        chats = [self._with_system(chat) for chat in chats]
        texts = self.processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        if self.count not in (0, self.layout.most):  # another number than the template's
            own, asked = ("".join(latent_tokens(count)) for count in (self.layout.most, self.count))
            texts = [text.removesuffix(own) + asked for text in texts]
        inputs: BatchFeature = self.processor(
            text=texts,
            images=images_of(chats) or None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **text_settings(self.tokenizer, texts),
        )
        self._check_latents(inputs["input_ids"])
        moved = dict(inputs.to(self.device))
        return self.intervention(self.model, moved, self.latent_ids) if self.intervention is not None else moved

    def _check_latents(self, tokens: Tensor) -> None:
        """An export whose prompts hold K latents must have each once in every prompt, and one that emits them none."""
        for number, token in enumerate(self.latent_ids[: self.layout.most]):
            if not bool(((tokens == token).sum(1) == (number < self.count)).all()):
                raise UserError(
                    f"{EXPORT_CARD} says {self.count} latents, but the prompts the chat template writes hold other "
                    "ones; export the run again with tools/export.py"
                )

    def _with_system(self, chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not self.system:
            return chat
        first = {"role": "system", "content": [{"type": "text", "text": self.system}]}
        return [first, *(message for message in chat if message["role"] != "system")]

    def _chat(self, request: Instance) -> list[dict[str, Any]]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        _, videos, audios = messages.extract_media()
        if videos or audios:
            raise UserError(f"task '{task}' shows video or audio; the model laavit reads images")
        return messages.to_hf_messages()

    def _batches(self, requests: Sequence[Instance]) -> Iterator[tuple[list[int], Settings]]:
        """Requests of equal settings together, the longest questions first; a stable order, so runs repeat exactly."""
        groups: dict[Settings, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._settings(request.args[2]), []).append(index)
        for settings, indices in groups.items():
            indices.sort(key=lambda i: -len(requests[i].args[0]))
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size], settings

    def _settings(self, given: Mapping[str, Any]) -> Settings:
        if given.get("do_sample") or int(given.get("num_beams") or 1) > 1:
            logger.warning("the task asks for sampling or beams (%s); the model laavit decodes greedily", dict(given))
        until = given.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        return Settings(int(given.get("max_new_tokens") or self.max_new_tokens), tuple(stop for stop in stops if stop))

    @property
    def _stops(self) -> list[int]:
        stops = self.model.generation_config.eos_token_id
        if stops is None:
            stops = self.tokenizer.eos_token_id
        return stops if isinstance(stops, list) else [stops]

    @property
    def _pad(self) -> int:
        return self._stops[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

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


def read_export(folder: str | Path) -> dict[str, Any]:
    """``laavit.json`` of an export; {} for a checkpoint that has none.

    Raises:
        UserError: the file is not a JSON object.
    """
    return read_object(Path(folder) / EXPORT_CARD)


def _in_prompt(latents: str, layout: LatentLayout, pretrained: str) -> int:
    """How many latents a prompt holds.

    Raises:
        UserError: neither a switch nor a number, or a number that this model cannot be given.
    """
    if latents in SWITCH:
        return 0 if layout.emitted else layout.most
    if not latents.isdigit():
        raise UserError(f"latents={latents} was given; {nearest(latents, SWITCH)}, or how many")
    if layout.emitted or not layout.most:
        has = "writes its latents itself" if layout.emitted else "has none"
        raise UserError(f"latents={latents} is a number for the prompt, and '{pretrained}' {has}; allowed: on, off")
    if not 1 <= int(latents) <= layout.most:
        raise UserError(
            f"latents={latents} was given; '{pretrained}' has {layout.most}: allowed are on, off, 1 to that"
        )
    if int(latents) < (layout.least or layout.most):
        logger.warning("latents=%s: '%s' was never trained with so few", latents, pretrained)
    return int(latents)


def _intervention(
    latents: str, layout: LatentLayout, given: str | Mapping[str, Any] | None, imports: str | Sequence[str]
) -> Any | None:
    """What is done to the inputs; None leaves them as they are.

    Raises:
        UserError: no such intervention, arguments it does not take, or two at once.
    """
    import_custom(imports, Path(), "imports")
    if latents == "off" and given is not None:
        raise UserError("latents=off is an intervention itself (latents_off), and another one was given: give one")
    if given is None:  # emitted latents are no part of what the model is given
        masked = latents == "off" and not layout.emitted
        return build_part("intervention", "interventions", "latents_off") if masked else None
    spec = {"name": given} if isinstance(given, str) else dict(given)
    name = str(spec.get("name"))
    if name not in cards("interventions") and INTERVENTIONS.get(name) is not None:
        spec["type"] = spec.pop("name")
    return build_part("intervention", "interventions", spec)


def _device(asked: str | None) -> torch.device:
    if asked is None:
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda":
        asked = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={asked} was given, but torch sees no GPU; allowed here: cpu")
    return torch.device(asked)


def _load(pretrained: str, dtype: str, attention: str, limits: Mapping[str, int | None]) -> tuple[Any, Any]:
    if (Path(pretrained) / "adapter_config.json").is_file():
        raise UserError(f"'{pretrained}' holds adapters alone; export the run again without --adapters apart")
    try:
        model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype, attn_implementation=attention)
        processor = AutoProcessor.from_pretrained(pretrained, **{k: v for k, v in limits.items() if v is not None})
    except (OSError, ValueError) as error:  # what transformers raises where there is no model, or one of another kind
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no model could be loaded from '{pretrained}': {reason}") from error
    return model, processor


def _cut(text: str, until: Sequence[str]) -> str:
    """``text`` up to the first of the stop strings."""
    ends = [end for stop in until if (end := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
