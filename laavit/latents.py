"""K latent tokens between the question and the answer (LaViT, Sec. 4): learned tokens in the assistant's turn.

This module names the tokens and gives a model their embedding rows; where they stand in a sequence is
``laavit/backbones/chat.py``'s business.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from laavit.registry import LATENTS, UserError

LATENT_TOKENS = "<|latent_{}|>"
SEPARATOR = "<|latent_end|>"


def latent_tokens(count: int) -> list[str]:
    """The texts of K latent tokens and their separator; an empty list for K = 0."""
    return [LATENT_TOKENS.format(i) for i in range(1, count + 1)] + [SEPARATOR] if count else []


@LATENTS.register_module()
class LearnedLatents:
    """K learned tokens, followed by a separator, written by the chat template: a prefill, no extra decoding step.

    Args:
        count: K (paper: 4).
        init: where the new embedding rows start: 'mean' of the vocabulary, 'random' (a normal of the vocabulary's
            own mean and spread), or the text of a token whose row is copied.
        noise: spread of a normal added to each row, in units of the vocabulary's own spread, so that K latents that
            start alike can become different.
    """

    def __init__(self, count: int = 4, init: str = "mean", noise: float = 0.1) -> None:
        if count < 1:
            raise UserError(f"latents.count is at least 1, got {count}; leave latents out (None) for a student without")
        if noise < 0:
            raise UserError(f"latents.noise is not negative, got {noise}")
        self.count, self.init, self.noise = count, init, noise

    def add_to(self, model: Any, tokenizer: Any, generator: torch.Generator) -> None:
        """Give the tokenizer the latent tokens and the embedding (and an untied head) their rows; adds none twice."""
        vocabulary = len(tokenizer)
        new = [t for t in latent_tokens(self.count) if t not in tokenizer.get_vocab()]
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
