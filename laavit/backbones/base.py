"""A Hugging Face vision-language model and its processor, opened the same way as teacher, student or baseline."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn
from transformers import Cache

from laavit.attention import IMPLEMENTATION, AttentionContext
from laavit.backbones.chat import IGNORED, PromptSettings, SequenceBuilder
from laavit.backbones.families import family_of
from laavit.backbones.feature_cache import CachedFeatures, image_keys
from laavit.backbones.loading import check_map, dtype_of, quantization_config, read_model, read_processor
from laavit.backbones.unrolling import fed_back, unrolled
from laavit.files import read_object
from laavit.latents import NO_LATENTS, LatentLayout, latent_tokens, layout_of
from laavit.packing import Packing, no_mask
from laavit.paths import EXPORT_CARD
from laavit.recipe import zoo_path
from laavit.registry import UserError
from laavit.structures import Batch, Encoded, Role, SharedPrefix

__all__ = ["Backbone", "collate", "digest_of", "dtype_of"]


class Backbone:
    """A model with its processor and its family's geometry.

    Args:
        model: the Hugging Face model. processor: its processor.
        layout: of the latents that it was trained with, or will be: whether they are fed back.
    """

    def __init__(self, model: nn.Module, processor: Any, layout: LatentLayout = NO_LATENTS) -> None:
        self.model, self.processor, self.layout = model, processor, layout
        self.family = family_of(model.config, processor)  # type: ignore[arg-type]
        #: what a frozen tower made of images, kept while training (``train.cache_vision``); None works it out each time
        self.feature_cache: CachedFeatures | None = None
        #: take as many passes for every batch as the most latents need, as processes must that run blocks together
        self.even_passes = False

    @classmethod
    def load(
        cls,
        path: str,
        dtype: str = "float32",
        device: str = "cpu",
        attention: str = IMPLEMENTATION,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        quantization: str | Mapping[str, Any] | None = None,
        images: Mapping[str, Any] | None = None,
    ) -> Backbone:
        """A folder, a hub name or ``zoo:NAME`` as a backbone; its text decoder runs laavit's attention function.

        Args:
            device: where the model goes, unless ``device_map`` says so.
            min_pixels, max_pixels: images are scaled to lie between; None keeps the processor's own bound. They are
                saved with the processor, so that an export sees images as its training did.
            device_map: spreads the model over devices: 'auto' or another of transformers' ways, or module -> device.
            quantization: '8bit', '4bit', or arguments of transformers' ``BitsAndBytesConfig``.
            images: settings of the image processor by name, as far as the family lets them be changed.

        Raises:
            UserError: no model can be read there or in this way, laavit does not know its family, the bounds
                contradict each other, or its decoder does not take the attention function.
        """
        kind = dtype_of(dtype)
        check_map(device_map)
        quantized = quantization_config(quantization, kind)
        processor = read_processor(path, min_pixels, max_pixels)  # small, and refused before the weights are read
        model = read_model(path, kind, device, attention, device_map, quantized)
        backbone = cls(model, processor, exported_layout(path))
        backbone.family.set_images(images or {})
        if backbone.attention != attention:
            raise UserError(f"the decoder of '{path}' runs the attention '{backbone.attention}', not '{attention}'")
        return backbone

    @property
    def attention(self) -> str:
        """The attention function that the decoder runs."""
        return str(self.family.decoder(self.model).config._attn_implementation)  # type: ignore[union-attr]

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def depth(self) -> int:
        """Number of decoder layers, L."""
        return int(self.model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr, operator]

    @property
    def width(self) -> int:
        """Width of the decoder's hidden states, D."""
        return int(self.model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]

    @property
    def device(self) -> torch.device:
        """Where inputs go: of the first weights, those apart that wait on the disk."""
        return next(p.device for p in self.model.parameters() if p.device.type != "meta")

    @cached_property
    def stops(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        return sorted({self.tokenizer.eos_token_id, self.family.end_of_turn()})

    def builder(self, prompt: PromptSettings, latents: int | LatentLayout = 0) -> SequenceBuilder:
        return SequenceBuilder(self.processor, self.family, prompt, latents)

    def forward(self, batch: Batch, context: AttentionContext | None = None) -> Tensor:
        """Hidden states after the decoder's final norm: [B, S, D]; in several passes where latents are fed back, or
        samples share their beginning.

        Right-padded batches need no attention mask: a causal decoder never looks ahead into the padding.
        """
        if batch.shared is not None or (self.layout.feedback and bool((batch.roles == Role.LATENT).any())):
            return unrolled(self, batch, context)
        if batch.packing is not None:
            context = context or AttentionContext()
            context.packing = batch.packing
        return self.read(batch, context)

    def read(self, batch: Batch, context: AttentionContext | None = None, stop: int | None = None) -> Tensor:
        """One pass over a batch's first ``stop`` columns, all its images among them; as ``forward``.

        Of samples that share their beginning one each: [P, stop, D].
        """
        rows = slice(None) if batch.shared is None else batch.shared.first
        ids, positions = batch.input_ids[rows, :stop], batch.position_ids
        positions = positions[..., rows, :stop] if positions is not None else None
        inputs, packing = self._image_inputs(batch), context.packing if context is not None else None
        if packing is not None:
            positions = packing.columns[None] if positions is None else packing.pack_ids(positions)
            masks = self.family.masks(self.model, ids)
            ids, inputs["attention_mask"] = packing.pack(ids), no_mask(ids.device) if masks is None else masks
        inputs |= self.family.text_inputs(ids)
        output = self.model.model(  # type: ignore[operator]
            input_ids=ids, position_ids=positions, use_cache=False, laavit=context, **inputs
        )
        states: Tensor = output.last_hidden_state
        return states if packing is None else packing.unpack(states)

    def _image_inputs(self, batch: Batch) -> dict[str, Any]:
        """Forward arguments for a batch's images: pixels, or features where they are cached."""
        if batch.features is not None:
            return self.family.inputs(batch.vision, [features.to(self.device) for features in batch.features])
        if self.feature_cache is None:
            return self.family.inputs(batch.vision)
        seen = batch.samples if batch.shared is None else [batch.samples[row] for row in batch.shared.first.tolist()]
        return self.feature_cache.in_place_of_pixels(batch.vision, image_keys(seen))

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of chosen states: [..., D] -> [..., V]."""
        return self.model.get_output_embeddings()(hidden)  # type: ignore[operator]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Encoded],
        max_new_tokens: int,
        repetition_penalty: float = 1.0,
        cache: Cache | None = None,
    ) -> list[str]:
        """Greedy answers to generation prompts, one text each; prompts are left-padded into one batch.

        Latents that the model writes itself are no part of them, and none of their ``max_new_tokens``.

        Args:
            cache: an empty one, to be left with the keys and values of prompts and answers (``go_on``).

        Raises:
            UserError: latents are fed back, and a cache is given, or the prompts do not end with latents.
        """
        length = max(len(p.input_ids) for p in prompts)
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(prompts), length), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt.input_ids) :] = prompt.input_ids
            mask[row, length - len(prompt.input_ids) :] = 1
        features = [p.features.to(self.device) for p in prompts if p.features is not None] or None
        inputs = self.family.inputs(self.family.batch([p.vision for p in prompts]), features)
        inputs |= {"input_ids": ids, "attention_mask": mask} | self.family.text_inputs(ids)
        inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        if self.layout.feedback and any(bool((p.roles == Role.LATENT).any()) for p in prompts):
            if cache is not None:
                raise UserError("latents that are fed back are read in passes of their own: take extract.passes=2")
            inputs = fed_back(self, inputs)
        if cache is not None:
            inputs["past_key_values"] = cache
        out = self.model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=max_new_tokens + self.layout.written, do_sample=False,
            repetition_penalty=repetition_penalty, temperature=None, top_p=None, top_k=None,
            pad_token_id=pad, eos_token_id=self.stops,
        )  # fmt: skip
        markup = set(
            self.tokenizer.convert_tokens_to_ids(latent_tokens(self.layout.most)) if self.layout.emitted else ()
        )
        words = [[token for token in row if token not in markup][:max_new_tokens] for row in out[:, length:].tolist()]
        return [t.strip() for t in self.tokenizer.batch_decode(words, skip_special_tokens=True)]

    def go_on(
        self, prompts: Sequence[Encoded], answered: Sequence[Encoded], cache: Cache, context: AttentionContext
    ) -> None:
        """Read what follows prompts whose keys and values are cached.

        Args:
            prompts: as they were given to ``generate``. answered: the same, with the words to read after them.
            cache: as ``generate`` left it; what it holds beyond the prompts is dropped, the words' keys come instead.
            context: of the pass; its rows count from the first word.
        """
        starts = [len(p.input_ids) for p in prompts]
        length, width = max(starts), max(len(a.input_ids) - s for a, s in zip(answered, starts, strict=True))
        ids = torch.full((len(prompts), width), self.tokenizer.pad_token_id)
        mask = torch.ones(len(prompts), length + width, dtype=torch.long)
        # Words are right-padded: no word looks at what comes after it.
        positions = torch.tensor(starts)[:, None] + torch.arange(width)
        if answered[0].position_ids is not None and answered[0].position_ids.ndim == 2:
            positions = positions.expand(3, -1, -1).clone()
        for row, (item, start) in enumerate(zip(answered, starts, strict=True)):
            words = item.input_ids[start:]
            ids[row, : len(words)] = words
            mask[row, : length - start] = 0
            if item.position_ids is not None:
                positions[..., row, : len(words)] = item.position_ids[..., start:]
        cache.crop(length - cache.get_seq_length())
        self.model.model(  # type: ignore[operator]
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), position_ids=positions.to(self.device),
            past_key_values=cache, use_cache=True, laavit=context,
        )  # fmt: skip

    def weights_digest(self) -> str | None:
        """SHA-256 of the weights, independent of the file they came from; None where another process has them."""
        return None if any(p.is_meta for p in self.model.parameters()) else digest_of(self.model)

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a plain Hugging Face folder: configuration, weights, generation settings, processor.

        Args:
            state: the model's ``state_dict`` of another moment; its own where it is left out.
        """
        weights = None if state is None else dict(state)
        self.model.save_pretrained(folder, state_dict=weights, safe_serialization=True)  # type: ignore[operator]
        self.processor.save_pretrained(folder)


def exported_layout(path: str) -> LatentLayout:
    """The layout of the latents that an export was trained with; ``NO_LATENTS`` where a folder is no export."""
    return layout_of(read_object(Path(zoo_path(path)) / EXPORT_CARD))


def digest_of(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over a module's parameters and buffers, or over tensors, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted((weights.state_dict() if isinstance(weights, nn.Module) else weights).items()):
        digest.update(name.encode())
        digest.update(serialise({"t": tensor.detach().cpu().contiguous()}))
    return digest.hexdigest()


def shared_prefix(items: Sequence[Encoded], image_token: int) -> SharedPrefix | None:
    """Which samples begin with the same images and tokens, up to the last image's end; it may be that no two do.

    None where a sample's question stands before an image, or a sample has none. Where no two samples begin alike they
    are read in two passes all the same: processes that hold shares of the weights (fsdp2) gather them together, and
    one of fewer passes would leave the others waiting.

    Args:
        items: encoded samples. image_token: the id that stands where an image does, separators included.
    """
    known: dict[Any, int] = {}
    owners: list[int] = []
    first: list[int] = []
    stops: list[int] = []
    for place, item in enumerate(items):
        seen = (item.input_ids == image_token).nonzero()
        stop = max([span.end for span in item.spans] + [int(seen.max()) + 1 if len(seen) else 0])
        if stop == 0 or bool((item.roles[:stop] == Role.QUESTION).any()):
            return None
        key = item.sample.images, item.input_ids[:stop].numpy().tobytes()
        if key not in known:
            known[key] = len(first)
            first.append(place)
            stops.append(stop)
        owners.append(known[key])
    return SharedPrefix(torch.tensor(owners), torch.tensor(first), torch.tensor(stops))


def collate(items: Sequence[Encoded], family: Any, pad: int, share: bool = False, pack: bool = False) -> Batch:
    """Right-pad samples into one batch.

    Args:
        items: encoded samples, all that have images with cached features or all without. family: their model family.
        pad: padding token id. share: read what samples begin with alike once (``shared_prefix``).
        pack: have the decoder read one row without padding (laavit/packing.py).
    """
    shared = shared_prefix(items, family.image_token_id) if share else None
    seen = items if shared is None else [items[place] for place in shared.first.tolist()]
    lengths = torch.tensor([len(item.input_ids) for item in items])
    length = int(lengths.max())

    def padded(tensors: Sequence[Tensor], fill: int) -> Tensor:
        out = tensors[0].new_full((len(tensors), *tensors[0].shape[:-1], length), fill)
        for row, tensor in enumerate(tensors):
            out[row, ..., : tensor.shape[-1]] = tensor
        return out

    positions = None
    if items[0].position_ids is not None:
        positions = padded([item.position_ids for item in items if item.position_ids is not None], 0)
        if positions.ndim == 3:
            positions = positions.transpose(0, 1)  # the family's [3, S] become [3, B, S]
    features = [item.features for item in seen if item.features is not None]
    if features and len(features) != sum(bool(item.spans) for item in seen):
        raise ValueError("a batch mixes samples with and without cached image features")
    return Batch(
        input_ids=padded([item.input_ids for item in items], pad),
        roles=padded([item.roles for item in items], int(Role.OTHER)),
        labels=padded([item.labels for item in items], IGNORED),
        position_ids=positions,
        spans=[item.spans for item in items],
        headers=[item.header for item in items],
        vision=family.batch([item.vision for item in seen]),
        samples=[item.sample for item in items],
        features=features or None,
        shared=shared,
        packing=Packing.of(torch.arange(length) < lengths[:, None]) if pack else None,
    )
