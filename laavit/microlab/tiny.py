"""Tiny but real: a Qwen2.5-VL tokenizer, processor and model for the micro-lab's scenes, built from nothing.

All classes are transformers' own; only the sizes are small. 96 x 96 px, patch 8, merge 2: 36 image tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from laavit.microlab.questions import ask
from laavit.microlab.scenes import IMAGE_SIZE, make_scene

PATCH, MERGE, VOCABULARY = 8, 2, 512
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
#: Qwen2's own splitting of text into words
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEFAULT_SYSTEM = "You are a helpful assistant."
#: The relevant part of Qwen2.5-VL's template: a default system prompt, images and texts in the order given.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    + DEFAULT_SYSTEM
    + "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Sizes:
    """Widths and depths of a tiny model; the MLPs are ``mlp`` times as wide as the states."""

    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    vision_width: int = 64
    vision_layers: int = 3
    vision_heads: int = 4
    mlp: int = 3


def build_tokenizer(system_prompts: tuple[str, ...] = (), scenes: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, any text goes in, trained so that the micro-lab's words are one token each."""
    corpus = [system for system in (DEFAULT_SYSTEM, *system_prompts) for _ in range(scenes)]
    corpus += ["system\n", "user\n", "assistant\n"] * scenes
    for index in range(scenes):
        for question in ask(make_scene(0, index)):
            corpus += [question.text, question.answer]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 72,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|endoftext|>", eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return tokenizer


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's processor; images of 96 x 96 px keep their size."""
    pixels = {"shortest_edge": 4 * (PATCH * MERGE) ** 2, "longest_edge": 4 * IMAGE_SIZE**2}
    sizes: dict[str, Any] = {"patch_size": PATCH, "merge_size": MERGE, "size": pixels}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=PATCH, merge_size=MERGE),
        chat_template=TEMPLATE,
    )


def build_model(sizes: Sizes, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised Qwen2.5-VL with 72 or more free embedding rows, every matrix scaled by its fan-in."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    head = sizes.text_width // sizes.text_heads
    section = [head // 2 - 2 * (head // 6), head // 6, head // 6]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": sizes.text_width,
            "intermediate_size": sizes.mlp * sizes.text_width,
            "num_hidden_layers": sizes.text_layers,
            "num_attention_heads": sizes.text_heads,
            "num_key_value_heads": sizes.text_heads,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": sizes.vision_layers,
            "hidden_size": sizes.vision_width,
            "intermediate_size": sizes.mlp * sizes.vision_width,
            "num_heads": sizes.vision_heads,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "out_hidden_size": sizes.text_width,
            "window_size": IMAGE_SIZE,
            "fullatt_block_indexes": list(range(sizes.vision_layers)),
        },
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
        _scale_by_fan_in(model)
    model.generation_config.update(eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], do_sample=False)
    return model


@torch.no_grad()
def _scale_by_fan_in(model: nn.Module) -> None:
    """transformers' fixed spread of 0.02 suits widths in the thousands; at 128 signals would die out."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=1 / math.sqrt(fan_in))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight.shape[1]))
