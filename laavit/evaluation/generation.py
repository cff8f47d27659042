"""A checkpoint that answers chats: template, processor, ``generate``, and nothing of lmms-eval's tasks.

An export's chat template writes ``<|latent_1|> … <|latent_K|><|latent_end|>`` after the generation prompt, so the model
is driven exactly as any other. What is added here are interventions on what it is given; ``latents=off`` is one, the
ablation "without latent tokens (masked at inference)" of LaViT (arXiv 2601.10129, Table 3). A student that emits its
latents writes them before its answer: they cost the answer none of its tokens, are no part of its text, and are
counted, so that latents that silently stay away are seen.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from laavit.backbones.base import Backbone
from laavit.backbones.chat import ORDERS, text_settings
from laavit.backbones.families import family_of
from laavit.backbones.feature_cache import GRID, PATCHES, CachedFeatures
from laavit.backbones.unrolling import fed_back
from laavit.custom import import_custom
from laavit.evaluation.images import CachedImages, images_of
from laavit.evaluation.interventions import Chat, Intervention, MaskLatents, Question, Questions, latent_ids
from laavit.evaluation.interventions.base import intervention_of
from laavit.evaluation.interventions.observing import Observer, watching
from laavit.evaluation.interventions.states import Reading
from laavit.files import read_object
from laavit.latents import SEPARATOR, LatentLayout, latent_tokens, layout_of
from laavit.paths import EXPORT_CARD
from laavit.registry import FAMILIES, UserError, nearest

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
SWITCH = ("on", "off")


@dataclass(frozen=True)
class Settings:
    """How one group of requests is generated: greedily, up to ``max_new_tokens``, cut at the first of ``until``."""

    max_new_tokens: int
    until: tuple[str, ...]


class Answerer:
    """A vision-language checkpoint that answers: batched, left-padded, greedy, deterministic.

    Args:
        pretrained: a folder (an export, or any checkpoint of ``AutoModelForImageTextToText``) or a hub name.
        device: 'cpu', 'cuda', 'cuda:1', …; by default a GPU where there is one (one a rank).
        dtype: 'auto' (as stored), 'float32', 'bfloat16' or 'float16'.
        latents: 'on', or 'off': latents in the prompt are masked (the intervention 'latents_off'), emitted ones are
            forbidden, with their separator. A number N: that many in the prompt, of a student whose prompt holds them.
        system: the system prompt itself; None takes what the export stores in ``laavit.json``, and without one the chat
            template's own.
        attention: the attention implementation of transformers.
        min_pixels, max_pixels: overrides of the image processor's limits.
        image_cache_mb: memory for prepared images. feature_cache_mb: memory for what the vision tower made of them.
        intervention: a name in registry/interventions or a registered class, or dict(name= or type=..., arguments).
        imports: modules and ``.py`` files that register interventions of the user's own; they are executed.

    Raises:
        UserError: an argument is not allowed, the model cannot be loaded, or it has no latents to mask.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        latents: str | int = "on",
        system: str | None = None,
        attention: str = "sdpa",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        image_cache_mb: int = 256,
        feature_cache_mb: int = 512,
        intervention: str | Mapping[str, Any] | None = None,
        imports: str | Sequence[str] = (),
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype} was given; {nearest(dtype, DTYPES)}")
        self.device = _device(device)
        self.export = read_export(pretrained)
        self._warn_of_other_prompts()
        self.layout, self.latents = layout_of(self.export), str(latents)
        self.count = _in_prompt(self.latents, self.layout, pretrained)
        self.intervention = _intervention(self.latents, intervention, imports)
        #: what is noted of every question, and readings that interventions need not make again
        self.observer: Observer | None = None
        self.readings: Mapping[tuple[str, int], Reading] = {}
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self.model, self.processor = _load(str(pretrained), dtype, attention, limits)
        self.model.to(self.device).eval()
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        self.images = CachedImages(self.processor.image_processor, image_cache_mb * 2**20)
        self.processor.image_processor = self.images
        self.features = _features(self.model, self.processor, feature_cache_mb * 2**20)
        #: what unrolls latents that are fed back; None where there are none
        self.backbone = Backbone(self.model, self.processor, self.layout) if self.layout.feedback else None
        self.system = system if system is not None else self.export.get("system")
        self.latent_ids = latent_ids(self.tokenizer)
        if self.latents == "off" and not self.latent_ids:
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

    def answer(self, chats: Sequence[Chat], settings: Settings) -> list[GenerationResult]:
        """Greedy answers to Hugging Face chats (images as ``{"type": "image", "image": PIL}``), as one batch."""
        return [answer for answer, _ in self.answer_and_count(chats, settings)]

    @torch.inference_mode()
    def answer_and_count(
        self, chats: Sequence[Chat], settings: Settings, questions: Sequence[Question] | None = None
    ) -> list[tuple[GenerationResult, int]]:
        """The answers, and how many latents the model wrote for each (0 where its prompt holds them).

        Args:
            questions: which ones of a task the chats are, for interventions that need to know.
        """
        questions = questions or Questions.of(chats)
        if self.intervention is not None:
            chats = self.intervention.chats(questions)
        inputs, markup, results = self.prepared(chats), self.markup, []
        with watching(self, questions, inputs) as more:
            output = self.generate(inputs, settings.max_new_tokens, **more)
        for tokens, prompt in zip(output.tolist(), inputs["attention_mask"].sum(1).tolist()):
            length = next((i for i, token in enumerate(tokens) if token in self._stops), len(tokens))
            latents = [token for token in tokens[:length] if token in markup]
            words = [token for token in tokens[:length] if token not in markup][: settings.max_new_tokens]
            text = self.tokenizer.decode(words, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            text = _cut(text, settings.until).lstrip()  # a family's space between the assistant's header and its words
            counts = TokenCounts(input_tokens=prompt, output_tokens=len(latents) + len(words))
            results.append((GenerationResult(text, counts), sum(token in self.latent_ids for token in latents)))
        return results

    def generate(self, inputs: dict[str, Any], max_new_tokens: int, **arguments: Any) -> Tensor:
        """The tokens written greedily after prompts, [B, T]; latents that the model writes itself come on top.

        Args:
            inputs: as ``encode`` gives them. arguments: more of transformers' ``generate``.
        """
        if self.backbone is not None:
            inputs = fed_back(self.backbone, inputs)
        room = self.layout.written
        if self.silenced:
            arguments, room = arguments | {"suppress_tokens": sorted(self.markup)}, 0
        output: Tensor = self.model.generate(
            **inputs, **arguments, max_new_tokens=max_new_tokens + room, do_sample=False, num_beams=1,
            temperature=None, top_p=None, top_k=None, eos_token_id=self._stops, pad_token_id=self._pad,
        )  # fmt: skip
        return output[:, inputs["input_ids"].shape[1] :]

    @property
    def markup(self) -> set[int]:
        """Ids of latents and separator, where the model writes them itself."""
        return {*self.latent_ids, self.tokenizer.convert_tokens_to_ids(SEPARATOR)} if self.layout.emitted else set()

    @property
    def silenced(self) -> bool:
        """Whether a model that writes its latents itself is kept from it: they cannot be masked in its prompt."""
        return self.layout.emitted and isinstance(self.intervention, MaskLatents)

    @property
    def most_latents(self) -> int:
        """How many latents a question has, at most."""
        return self.count or self.layout.most

    @property
    def decoder(self) -> Any:
        """The text decoder. Raises: UserError: laavit does not know the family."""
        return family_of(self.model.config, self.processor).decoder(self.model)

    @contextmanager
    def altered(
        self, part: Intervention | None, observer: Observer | None, readings: Mapping[tuple[str, int], Reading]
    ) -> Iterator[None]:
        """Answers are given under an intervention, and looked at, while this is open."""
        kept = self.intervention, self.observer, self.readings
        self.intervention, self.observer, self.readings = part, observer, readings
        try:
            yield
        finally:
            self.intervention, self.observer, self.readings = kept

    def encode(self, chats: Sequence[Chat]) -> dict[str, Tensor]:
        """What ``generate`` is given for these chats, on the device; latents masked where that was asked for."""
        return self._changed(self._encoded(chats))

    def _encoded(self, chats: Sequence[Chat]) -> dict[str, Tensor]:
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
        return dict(inputs.to(self.device))

    def _changed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.intervention is None or self.silenced:
            return inputs
        return self.intervention(self.model, inputs, self.latent_ids)

    def prepared(self, chats: Sequence[Chat]) -> dict[str, Any]:
        """As ``encode``, with kept features in place of pixels that no intervention has changed."""
        with self.images.unchanging():
            return self._prepared(chats)

    def _prepared(self, chats: Sequence[Chat]) -> dict[str, Any]:
        plain = self._encoded(chats)
        if self.features is None or "pixel_values" not in plain:
            return self._changed(plain)
        if self.intervention is None:
            inputs = plain
        else:  # which may write into what it is given
            inputs = self._changed({name: value.clone() for name, value in plain.items()})
            if not all(name in inputs and torch.equal(plain[name], inputs[name]) for name in (PATCHES, GRID)):
                return inputs
        keys = [self.images.digest(image) for own in images_of(chats) for image in own]
        return self.features.in_place_of_pixels(inputs, keys)

    def _check_latents(self, tokens: Tensor) -> None:
        """An export whose prompts hold K latents must have each once in every prompt, and one that emits them none."""
        for number, token in enumerate(self.latent_ids[: self.layout.most]):
            if not bool(((tokens == token).sum(1) == (number < self.count)).all()):
                raise UserError(
                    f"{EXPORT_CARD} says {self.count} latents, but the prompts the chat template writes hold other "
                    "ones; export the run again with tools/export.py"
                )

    def _with_system(self, chat: Chat) -> Chat:
        if not self.system:
            return chat
        first = {"role": "system", "content": [{"type": "text", "text": self.system}]}
        return [first, *(message for message in chat if message["role"] != "system")]

    @property
    def _stops(self) -> list[int]:
        stops = self.model.generation_config.eos_token_id
        if stops is None:
            stops = self.tokenizer.eos_token_id
        return stops if isinstance(stops, list) else [stops]

    @property
    def _pad(self) -> int:
        return self._stops[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id


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
    latents: str, given: str | Mapping[str, Any] | None, imports: str | Sequence[str]
) -> Intervention | None:
    """What is changed; None leaves all as it is.

    Raises:
        UserError: no such intervention, arguments it does not take, or two at once.
    """
    import_custom(imports, Path(), "imports")
    if latents == "off" and given is not None:
        raise UserError("latents=off is an intervention itself (latents_off), and another one was given: give one")
    if given is None:
        return intervention_of("latents_off") if latents == "off" else None
    return intervention_of(given)


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


def _features(model: Any, processor: Any, limit: int) -> CachedFeatures | None:
    """None for a family that laavit does not know, or that cannot be handed features."""
    if not limit or model.config.model_type not in FAMILIES:
        return None
    family = family_of(model.config, processor)
    return CachedFeatures(family, model, limit) if family.takes_features else None
