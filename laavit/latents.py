"""K latent tokens between the question and the answer (LaViT, Sec. 4), in the assistant's turn.

This module names the tokens, says how many there are and what fills them, and gives a model their embedding rows; where
they stand in a sequence is ``laavit/backbones/chat.py``'s business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from laavit.registry import LATENTS, UserError, nearest

LATENT_TOKENS = "<|latent_{}|>"
SEPARATOR = "<|latent_end|>"
#: how a state is scaled before it is fed back
SCALES = ("none", "vocabulary")
#: attention functions that keep the keys of earlier passes, as latents that are fed back need it in training
KEEPING = ("laavit", "laavit_flex")


def latent_tokens(count: int) -> list[str]:
    """The texts of K latent tokens and their separator; an empty list for K = 0."""
    return [LATENT_TOKENS.format(i) for i in range(1, count + 1)] + [SEPARATOR] if count else []


@dataclass(frozen=True)
class LatentLayout:
    """How many latents stand in a sequence, who writes them, and what the decoder reads there.

    Args:
        most: K, or the most where the number varies; 0 is no latents and no separator.
        least: the fewest; None is ``most``.
        emitted: the model writes latents and separator itself, after the prompt and with a loss on them; otherwise the
            prompt ends with them.
        feedback: the decoder reads the state of the position before in place of a latent token's embedding.
        scale: of a state that is fed back: 'none', or 'vocabulary' (the root mean square of the input embeddings).
        seed: fixes the number of each sample.
        emit_weight: of the cross-entropy on what is emitted, beside the answer's.
    """

    most: int = 0
    least: int | None = None
    emitted: bool = False
    feedback: bool = False
    scale: str = "none"
    seed: int = 0
    emit_weight: float = 1.0

    @property
    def written(self) -> int:
        """How many tokens the model writes before an answer, at most: the latents and the separator, or none."""
        return self.most + 1 if self.emitted and self.most else 0

    @property
    def varies(self) -> bool:
        return self.least is not None and self.least < self.most

    def count_of(self, sample_id: str) -> int:
        """The number of latents of a sample, uniform between the bounds and a function of its id alone."""
        if self.least is None or not self.varies:
            return self.most
        drawn = hashlib.sha256(f"{self.seed}:{sample_id}".encode()).digest()
        return self.least + int.from_bytes(drawn[:8], "big") % (self.most - self.least + 1)


#: a sequence without latents
NO_LATENTS = LatentLayout()


def layout_of(card: Mapping[str, Any]) -> LatentLayout:
    """The layout that an export's ``laavit.json`` tells of; cards that know a number alone mean forced latents."""
    return LatentLayout(**card["layout"]) if "layout" in card else LatentLayout(int(card.get("latents", 0)))


def check_attention(layout: LatentLayout, attention: str, shared: bool = False) -> None:
    """Raises: UserError: latents are fed back, or beginnings shared, and an attention function keeps no keys."""
    if (layout.feedback or shared) and attention not in KEEPING:
        what = "latents that are fed back are" if layout.feedback else "samples with a shared beginning are"
        raise UserError(
            f"attention: {what} read in several passes, and '{attention}' keeps no keys of "
            f"earlier ones; {nearest(attention, KEEPING)}"
        )


@LATENTS.register_module()
class LearnedLatents:
    """K learned tokens and a separator: written by the chat template (a prefill, no extra decoding step), or emitted.

    Args:
        count: K (paper: 4); or the fewest and the most, between which each sample has a number of its own.
        init: where the new embedding rows start: 'mean' of the vocabulary, 'random' (a normal of the vocabulary's
            own mean and spread), or the text of a token whose row is copied.
        noise: spread of a normal added to each row, in units of the vocabulary's own spread, so that K latents that
            start alike can become different.
        emitted: the model writes the latent tokens itself, and they carry a cross-entropy loss as the answer does.
        seed: fixes the number of latents of each sample, where it varies.
        emit_weight: of that loss in the total; the answer's has weight 1, and each is a mean over its own tokens.
    """

    def __init__(
        self,
        count: int | tuple[int, int] = 4,
        init: str = "mean",
        noise: float = 0.1,
        emitted: bool = False,
        seed: int = 0,
        emit_weight: float = 1.0,
    ) -> None:
        least, most = (count, count) if isinstance(count, int) else count
        if least < 1:
            raise UserError(f"latents.count is at least 1, got {count}; leave latents out (None) for a student without")
        if most < least:
            raise UserError(f"latents.count is (fewest, most), got {count}")
        if noise < 0:
            raise UserError(f"latents.noise is not negative, got {noise}")
        if not emit_weight > 0:
            raise UserError(f"latents.emit_weight is above 0, got {emit_weight}; emitted latents are learned")
        if emit_weight != 1.0 and not emitted:
            raise UserError(f"latents.emit_weight: got {emit_weight}, and these latents are not emitted")
        self.layout = LatentLayout(most, least, emitted, seed=seed, emit_weight=emit_weight)
        self.init, self.noise = init, noise

    def add_to(self, model: Any, tokenizer: Any, generator: torch.Generator) -> None:
        """Give the tokenizer the latent tokens and the embedding (and an untied head) their rows; adds none twice."""
        vocabulary = len(tokenizer)
        new = [t for t in latent_tokens(self.layout.most) if t not in tokenizer.get_vocab()]
        if not new:
            return
        tokenizer.add_tokens(new, special_tokens=True)
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(new))
        if int(ids.max()) >= model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(int(ids.max()) + 1, mean_resizing=False)
        tables = [model.get_input_embeddings(), model.get_output_embeddings()]
        for weight in {id(t.weight): t.weight for t in tables if t is not None}.values():
            self._initialise(weight, ids, vocabulary, tokenizer, generator)

    def _initialise(
        self, weight: nn.Parameter, ids: torch.Tensor, vocabulary: int, tokenizer: Any, generator: torch.Generator
    ) -> None:
        if weight.is_meta:  # a shape alone, whose values come from another process
            return
        known = weight.detach()[:vocabulary].float().cpu()
        spread = known.std(0)
        if self.init == "mean":
            rows = known.mean(0).expand(len(ids), -1)
        elif self.init == "random":
            rows = known.mean(0) + spread * torch.randn(len(ids), known.shape[1], generator=generator)
        else:
            given = tokenizer.encode(self.init, add_special_tokens=False)
            if len(given) != 1:
                raise UserError(
                    f"latents.init: got '{self.init}', which is {len(given)} tokens; "
                    "give 'mean', 'random' or one token's text"
                )
            rows = known[given[0]].expand(len(ids), -1)
        rows = rows + self.noise * spread * torch.randn(len(ids), known.shape[1], generator=generator)
        with torch.no_grad():
            weight[ids.to(weight.device)] = rows.to(weight)


@LATENTS.register_module()
class FeedbackLatents(LearnedLatents):
    """Continuous thought (Coconut, arXiv 2412.06769; LVR, arXiv 2509.24251): the decoder's states, fed back K times.

    The first latent reads the state of the last position before it, each other one the state of the latent before, in
    training as in generation (laavit/backbones/unrolling.py). The separator alone is a learned token.

    Args:
        count, init, noise, seed: as for learned latents.
        scale: of a state before it is read: 'none', or 'vocabulary' (the root mean square of the input embeddings).
    """

    def __init__(
        self,
        count: int | tuple[int, int] = 4,
        init: str = "mean",
        noise: float = 0.1,
        scale: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__(count, init, noise, seed=seed)
        if scale not in SCALES:
            raise UserError(f"latents.scale: got '{scale}'; {nearest(scale, SCALES)}")
        self.layout = replace(self.layout, feedback=True, scale=scale)
