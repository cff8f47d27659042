"""The contract of a model family: what the sequence builder and a backbone ask of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, get_type_hints

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig

from laavit.latents import latent_tokens
from laavit.registry import UserError, nearest
from laavit.structures import Span

#: stands for an answer while its frame in a chat is looked for; private characters that no text holds
ANSWER = "\ue002answer\ue003"


class Family:
    """Where a family keeps its image tokens; the defaults are those of a decoder with plain positions.

    Args:
        config: the model's configuration. processor: the model's processor, where geometry depends on its settings.
    """

    #: the processor's outputs that the vision tower reads
    vision_keys: tuple[str, ...] = ("pixel_values",)
    #: what the geometry alone reads; kept with the vision tensors, never given to the model
    geometry_keys: tuple[str, ...] = ()
    #: settings of the image processor that may be changed by name (``set_images``)
    image_settings: tuple[str, ...] = ()
    #: whether ``feature_inputs`` can hand image features over in place of pixels
    takes_features = False
    #: patches of the vision tower along each side of a token
    merge: int = 1

    def __init__(self, config: PreTrainedConfig, processor: Any) -> None:
        self.config, self.processor = config, processor
        self.image_token_id: int = config.image_token_id
        #: what stands for one image in a prompt's text before the processor expands it
        self.placeholder: str = processor.image_token

    def set_images(self, settings: Mapping[str, Any]) -> None:
        """Change how images are cut up, over what the checkpoint and the processor's class say.

        Raises:
            UserError: the family has no such setting, or it takes another type of value.
        """
        image_processor = self.processor.image_processor
        for name, value in settings.items():
            if name not in self.image_settings:
                raise UserError(
                    f"images: {type(self).__name__} has no setting '{name}'; {nearest(name, self.image_settings)}"
                )
            kind = get_type_hints(image_processor.valid_kwargs)[name]
            fits = isinstance(value, bool) if kind is bool else type(value) in {int, kind} and value > 0
            if not fits:
                raise UserError(
                    f"images.{name}: got {value!r}; allowed: a {'' if kind is bool else 'positive '}{kind.__name__}"
                )
            setattr(image_processor, name, value)
        if settings:  # defaults of the processor's class win over the image processor's own settings
            self.processor.images_kwargs = {**getattr(self.processor, "images_kwargs", {}), **settings}

    def vision(self, output: Mapping[str, Any], images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The vision tensors of one sample: the processor's output, and what it does not tell about its images.

        ``batch`` joins them with other samples' along their first dimension.
        """
        return {key: output[key] for key in self.vision_keys if key in output}

    def spans(self, input_ids: Tensor, vision: Mapping[str, Tensor]) -> tuple[Span, ...]:
        """Image tokens of one sequence [S], one Span an image or tile, in the order of their positions.

        Raises:
            ValueError: the number of image tokens differs from what the processor's geometry says.
        """
        raise TypeError(f"{type(self).__name__} must define spans(input_ids, vision)")

    def positions(self, input_ids: Tensor, vision: Mapping[str, Tensor]) -> Tensor | None:
        """Position ids of one sequence, long [3, S] or [S]; None where the model counts by itself."""
        return None

    def extend(self, positions: Tensor | None, count: int) -> Tensor | None:
        """Positions of a sequence that goes on with ``count`` text tokens."""
        if positions is None:
            return None
        more = positions.max() + 1 + torch.arange(count)
        return torch.cat([positions, more.expand(*positions.shape[:-1], -1)], dim=-1)

    def batch(self, vision: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Vision tensors of several samples as one input of the tower; samples without images bring none."""
        keys = {key for item in vision for key in item}
        return {key: torch.cat([item[key] for item in vision if key in item]) for key in sorted(keys)}

    def inputs(self, vision: Mapping[str, Tensor], features: Sequence[Tensor] | None = None) -> dict[str, Any]:
        """Forward arguments for a batch's vision tensors, or for features [N, D] a sample in place of its pixels."""
        found = {key: value for key, value in vision.items() if key not in self.geometry_keys}
        if features is None:
            return found
        return {k: v for k, v in found.items() if not k.startswith("pixel_")} | self.feature_inputs(features)

    def text_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        """What the model wants beside the token ids [B, S], for example which of them are image tokens."""
        return {}

    def masks(self, model: Any, input_ids: Tensor) -> Any:
        """The attention masks of a batch [B, S] as the decoder takes them, for rows that are read packed.

        None where every layer is causal and looks all the way back: then no mask is needed. A family whose image tokens
        look ahead, or whose layers do not look far, says so here.
        """
        return None

    def image_features(self, model: Any, vision: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What the language model reads in place of the tokens ``image_token_id``: [N_i, D] an image, all its tiles
        and separators in the order of their positions. (D: whatever ``feature_inputs`` takes back.)"""
        raise TypeError(f"{type(self).__name__} must define image_features(model, vision)")

    def feature_inputs(self, features: Sequence[Tensor]) -> dict[str, Any]:
        """Forward arguments that hand over cached features, [N, D] a sample or an image, in place of pixels."""
        raise TypeError(f"{type(self).__name__} does not take cached image features")

    @cached_property
    def answer_frame(self) -> tuple[str, int]:
        """What the chat template writes around an answer: the text between the assistant's header and it (Idefics3: a
        space), and the id of the token that ends the turn (Gemma 3: not its ``eos_token``)."""

        def turn(role: str, text: str) -> dict[str, Any]:
            return {"role": role, "content": [{"type": "text", "text": text}]}

        tokenizer, render = self.processor.tokenizer, self.processor.apply_chat_template
        header = render([turn("user", "?")], add_generation_prompt=True, tokenize=False)
        header = header.partition(latent_tokens(1)[0])[0]  # an exported template writes latents after it
        whole = render([turn("user", "?"), turn("assistant", ANSWER)], add_generation_prompt=False, tokenize=False)
        before, found, after = whole.partition(ANSWER)
        first = tokenizer.encode(after, add_special_tokens=False)[:1] if found else []
        special = bool(first) and first[0] in tokenizer.added_tokens_decoder
        between = before.removeprefix(header) if found and before.startswith(header) else ""
        return between, int(first[0] if special else tokenizer.eos_token_id)

    def end_of_turn(self) -> int:
        """The token that ends the assistant's turn."""
        return self.answer_frame[1]

    def vision_tower(self, model: Any) -> nn.Module:
        raise TypeError(f"{type(self).__name__} must define vision_tower(model)")

    def projector(self, model: Any) -> list[nn.Module | nn.Parameter]:
        """What stands between tower and decoder: here, whatever the model has beside the two.

        A family whose tower holds it says which modules of the tower it is.
        """
        apart = (self.vision_tower(model), self.decoder(model))
        beside = [child for child in model.model.children() if child not in apart]
        return [*beside, *model.model.parameters(recurse=False)]

    def decoder(self, model: Any) -> nn.Module:
        raise TypeError(f"{type(self).__name__} must define decoder(model)")
