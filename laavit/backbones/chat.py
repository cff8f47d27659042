"""The sequence contract: ``[system, user(image, question), assistant: <latents> answer]``, built in this one place.

Training, trace extraction, generation and evaluation all read sequences from here. Latents stand at the end of the
generation prompt, followed by a separator: the last latent predicts the separator, the separator predicts the first
answer token, so that a gate on answer positions reaches one-word answers too (the last latent always sees the image).
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from laavit.images import open_image
from laavit.latents import LatentLayout, latent_tokens
from laavit.registry import SETTINGS, UserError
from laavit.structures import Encoded, Role, Sample, Span

IGNORED = -100
#: stands for a question while its place in the prompt is looked for; private characters that no text holds
MARK = "\ue000question\ue001"
ORDERS = ("image_first", "question_first")


@SETTINGS.register_module(name="prompt")
@dataclass(frozen=True)
class PromptSettings:
    """How a question is put.

    Args:
        system: the system prompt (App. C.3: an expert that handles visual information through latent tokens, in our
            wording).
        order: 'image_first', or 'question_first' (then the image's states can depend on the question).
        suffix: text after the question, for example a request to answer in one word.
    """

    system: str = (
        "You are an expert multimodal assistant. Before you answer, you work through the visual evidence in a few "
        "specialised latent tokens, so that what you perceive and what you reason in words stay aligned."
    )
    order: str = "image_first"
    suffix: str = ""

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise UserError(f"prompt.order: got '{self.order}'; allowed: {', '.join(ORDERS)}")


def messages(sample: Sample, prompt: PromptSettings, placeholder: str = "") -> list[dict[str, Any]]:
    """The chat of one sample, without the answer, in transformers' message format.

    Args:
        placeholder: the images' placeholder, to be written into the text after the question (for templates that put
            every image first); empty leaves the images to the template.
    """
    pictures: list[dict[str, Any]] = [{"type": "image"} for _ in sample.images]
    text: list[dict[str, Any]] = [{"type": "text", "text": sample.question + prompt.suffix}]
    content = pictures + text if prompt.order == "image_first" else text + pictures
    if placeholder:
        written = "".join("\n" + placeholder for _ in sample.images)
        content = [{"type": "text", "text": sample.question + prompt.suffix + written}]
    system = [{"role": "system", "content": [{"type": "text", "text": prompt.system}]}] if prompt.system else []
    return [*system, {"role": "user", "content": content}]


def text_settings(tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """What a processor is told beside prompts that a chat template wrote: nothing, or to add no special tokens.

    A template that writes the first token itself (Gemma 3, Idefics3) must not get a second one from the tokenizer.
    """
    bos = tokenizer.bos_token
    return {"add_special_tokens": False} if bos and all(text.startswith(bos) for text in texts) else {}


@dataclass(frozen=True)
class _Layout:
    """A prompt as text, images not yet expanded. question: where its words stand, (start, stop) in characters.
    header: characters of the assistant's header, at the end."""

    text: str
    question: tuple[int, int]
    header: int


class SequenceBuilder:
    """Samples to token sequences with a role for every position.

    Args:
        processor: the model's processor, its tokenizer already holding the latent tokens.
        family: the model family's geometry.
        prompt: how the question is put.
        latents: how many there are and who writes them; a number K is that many, written by the prompt.

    Raises:
        UserError: the tokenizer does not hold the latent tokens.
    """

    def __init__(self, processor: Any, family: Any, prompt: PromptSettings, latents: int | LatentLayout = 0) -> None:
        self.processor, self.family, self.prompt = processor, family, prompt
        self.layout = LatentLayout(latents) if isinstance(latents, int) else latents
        tokenizer, tokens = processor.tokenizer, latent_tokens(self.layout.most)
        self.latent_ids: list[int] = tokenizer.convert_tokens_to_ids(tokens)
        missing = [t for t, i in zip(tokens, self.latent_ids) if i in (None, tokenizer.unk_token_id)]
        if missing:
            raise UserError(f"the tokenizer does not hold {', '.join(missing)}: add the latents to the student first")

    @property
    def key(self) -> Hashable:
        """All that its sequences depend on beside the samples."""
        processor = self.processor
        layout = (self.layout.most, self.layout.least, self.layout.emitted, self.layout.seed)
        parts = (self.prompt, layout, sorted(processor.tokenizer.get_vocab().items()), processor.chat_template)
        images = (processor.image_processor.to_dict(), getattr(processor, "images_kwargs", {}))
        return hashlib.sha256(repr((parts, images, type(self.family).__name__)).encode()).hexdigest()

    def prompt_of(self, sample: Sample, images: Sequence[Image.Image] | None = None) -> Encoded:
        """One sample as a generation prompt: everything up to what the model writes, forced latents included.

        Args:
            sample: image paths and question. images: already opened images, in place of the sample's paths.

        Raises:
            UserError: a broken image, one that the processor refuses, or a question without words or with a
                placeholder of images in it.
        """
        pictures = list(images) if images is not None else [open_image(path) for path in sample.images]
        layout = self._layout(sample)
        chat_ids, offsets, vision, spans = self._processed(sample, layout.text, pictures)
        latents = self.latents_of(sample) if not self.layout.emitted else chat_ids[:0]
        input_ids = torch.cat([chat_ids, latents])
        starts, stops = offsets.unbind(1)
        real = stops > starts  # a first token that the tokenizer adds by itself covers no text

        def covering(begin: int, end: int) -> tuple[int, int]:
            inside = (real & (stops > begin) & (starts < end)).nonzero().flatten().tolist()
            if not inside:
                raise UserError(f"sample '{sample.id}': the tokenizer leaves nothing of '{sample.question[:80]}'")
            return inside[0], inside[-1] + 1

        # The processor writes many tokens for a placeholder: what stands after the images moves by the difference.
        length = int(stops.max())
        shift = length - len(layout.text) if self.prompt.order == "image_first" else 0
        begin, end = covering(layout.question[0] + shift, layout.question[1] + shift)
        roles = torch.full(input_ids.shape, int(Role.OTHER), dtype=torch.uint8)
        roles[begin:end] = Role.QUESTION
        for span in spans:
            roles[span.positions()] = Role.IMAGE
        roles[len(chat_ids) :] = _latent_roles(len(latents))
        return Encoded(
            input_ids=input_ids,
            roles=roles,
            labels=torch.full(input_ids.shape, IGNORED),
            spans=spans,
            position_ids=self.family.positions(input_ids, vision),
            header=covering(length - layout.header, length) if layout.header else (len(chat_ids), len(chat_ids)),
            vision=vision,
            sample=sample,
        )

    def with_answer(self, prompt: Encoded, answer: str) -> Encoded:
        """A prompt continued by an answer and the end-of-turn token, all of it to be learned, emitted latents too."""
        text = self.family.answer_frame[0] + answer
        tokenizer = self.processor.tokenizer
        words = tokenizer.encode(text, add_special_tokens=False)
        if self.family.image_token_id in words:  # words that spell an image's place are words here
            words = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        written = self.latents_of(prompt.sample) if self.layout.emitted else prompt.input_ids[:0]
        learned = torch.cat([written, torch.tensor([*words, self.family.end_of_turn()])])
        roles = torch.full(learned.shape, int(Role.ANSWER), dtype=torch.uint8)
        roles[: len(written)] = _latent_roles(len(written))
        input_ids = torch.cat([prompt.input_ids, learned])
        labels = torch.full(input_ids.shape, IGNORED)
        labels[len(prompt.input_ids) - 1 : -1] = learned
        return replace(
            prompt,
            input_ids=input_ids,
            roles=torch.cat([prompt.roles, roles]),
            labels=labels,
            position_ids=self.family.extend(prompt.position_ids, len(learned)),
        )

    def latents_of(self, sample: Sample) -> Tensor:
        """A sample's latent tokens and the separator, long [K + 1]; none for K = 0."""
        count = self.layout.count_of(sample.id)
        return torch.tensor([*self.latent_ids[:count], *self.latent_ids[-1:]], dtype=torch.long)

    def encode(self, sample: Sample, answer: str) -> Encoded:
        """One sample with its answer, for training: ``with_answer(prompt_of(sample), answer)``."""
        return self.with_answer(self.prompt_of(sample), answer)

    def _layout(self, sample: Sample) -> _Layout:
        """The prompt's text, and where the question stands in it.

        Raises:
            UserError: the question has no words, holds the placeholder of an image, or the template changes it.
        """
        question = sample.question + self.prompt.suffix
        if not question.strip():
            raise UserError(f"sample '{sample.id}': the question is empty")
        if self.family.placeholder in question:
            raise UserError(f"sample '{sample.id}': the question holds '{self.family.placeholder}', an image's place")
        chat, marked = (messages(s, self.prompt) for s in (sample, replace(sample, question=MARK)))
        # Its place is found with a mark: the words of a question can stand elsewhere in the prompt, too.
        begin, image = (self._text(marked).find(part) for part in (MARK, self.family.placeholder))
        if self.prompt.order == "question_first" and 0 <= image < begin:  # a template that puts every image first
            inline = self.family.placeholder
            chat, marked = (messages(s, self.prompt, inline) for s in (sample, replace(sample, question=MARK)))
            begin = self._text(marked).find(MARK)
        text, header = self._text(chat), self._text(chat, open_turn=True)
        for words in (question, question.strip()):  # some templates strip what they are given
            if begin >= 0 and text.startswith(words, begin):
                return _Layout(text, (begin, begin + len(words)), len(text) - len(header))
        raise UserError(f"sample '{sample.id}': the chat template changed the question '{question[:80]}'")

    def _text(self, chat: list[dict[str, Any]], open_turn: bool = False) -> str:
        """A chat as text, with the assistant's header unless the turn is left open."""
        text: str = self.processor.apply_chat_template(chat, add_generation_prompt=not open_turn, tokenize=False)
        for token in reversed(latent_tokens(self.layout.most)):  # an exported template writes them itself
            text = text.removesuffix(token)
        return text

    def _processed(
        self, sample: Sample, text: str, pictures: Sequence[Image.Image]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], tuple[Span, ...]]:
        """Token ids [S], their characters [S, 2] in the expanded text, the tower's inputs, and the image tokens.

        Raises:
            UserError: the processor refuses an image.
        """
        try:
            output = self.processor(
                text=[text],
                images=[list(pictures)] if pictures else None,
                return_tensors="pt",
                return_offsets_mapping=True,
                **text_settings(self.processor.tokenizer, [text]),
            )
            input_ids: Tensor = output["input_ids"][0]
            vision = self.family.vision(output, pictures) if pictures else {}
            return input_ids, output["offset_mapping"][0], vision, self.family.spans(input_ids, vision)
        except ValueError as error:
            what = " ".join(str(error).split())
            raise UserError(f"sample '{sample.id}': the processor refuses it: {what}") from None


def _latent_roles(count: int) -> Tensor:
    """Roles of ``count`` tokens, all latents but the last, the separator: uint8 [count]."""
    roles = torch.full((count,), int(Role.LATENT), dtype=torch.uint8)
    roles[-1:] = Role.ANSWER
    return roles
