"""What the builders share: a byte-level tokenizer, and random weights whose signals neither die nor blow up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "system user assistant User: Assistant: model You are a helpful assistant. "
    "What colour is the shape left of the red circle? blue yes no Answer with one word.\n\n"
] * 4


def tokenizer(special: Sequence[str], *, bos: str | None = None, writes_bos: bool = False, **names: Any) -> Any:
    """A byte-level BPE tokenizer of some 340 tokens; any text goes in.

    Args:
        special: the family's special tokens. bos: its first token; ``writes_bos`` lets the tokenizer put it first by
            itself, as Llama's and Gemma's do. names: ``eos_token``, ``pad_token`` and what else the family names.
    """
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(special),
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    if writes_bos:
        assert bos is not None
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, inner.token_to_id(bos))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, clean_up_tokenization_spaces=False, model_max_length=1 << 20, **names
    )
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


@torch.no_grad()
def spread(model: nn.Module, seed: int) -> None:
    """Random weights scaled by their fan-in, sharper where attention is made, so that rows and maps differ visibly."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.add_(noise)  # norms stay near one (or zero, where they are offsets), biases near zero
            continue
        if "embed" in name and parameter.ndim == 2:
            fan_in = 1
        else:  # [out, in], [out, channels, kernel ...], or experts' [experts, out, in]
            fan_in = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()
        sharp = 2.0 if any(part in name for part in ("q_proj", "k_proj")) else 1.0
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * sharp / math.sqrt(fan_in))
