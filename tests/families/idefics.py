"""Tiny Idefics3 and SmolVLM: tiles with row and column markers and a global tile, pixel shuffle by 2 and by 4."""

from __future__ import annotations

from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from families.parts import spread, tokenizer

IMAGE = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
#: tokens of their own in SmolVLM's tokenizer; Idefics3 writes them in several plain ones
MARKERS = ("<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)))
#: first token, end of text, padding
NAMES = {
    "idefics3": ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>", "<|im_end|>"),
}
#: both families': roles are words, and a colon is followed by a space where text comes next
TEMPLATE = (
    "%s{%% for message in messages %%}{{message['role'].capitalize()}}"
    "{%% if message['content'][0]['type'] == 'image' %%}{{':'}}{%% else %%}{{': '}}{%% endif %%}"
    "{%% for line in message['content'] %%}{%% if line['type'] == 'text' %%}{{line['text']}}"
    "{%% elif line['type'] == 'image' %%}{{ '<image>' }}{%% endif %%}{%% endfor %%}<end_of_utterance>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ 'Assistant:' }}{%% endif %%}"
)
#: pixels of a tile's side, pixels of an image's longest side, patches merged along a side
GEOMETRY = {"idefics3": (32, 96, 2), "smolvlm": (48, 96, 4)}
PATCH = 4


def build(family: str, seed: int) -> tuple[Any, Any]:
    """A model and its processor."""
    first, end, pad = NAMES[family]
    tile, longest, scale = GEOMETRY[family]
    special = tuple(dict.fromkeys((*NAMES[family], *IMAGE, *(MARKERS if family == "smolvlm" else ()))))
    words = tokenizer(special, bos=first, writes_bos=family == "idefics3", eos_token=end, pad_token=pad)
    text = {
        "model_type": "llama",
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": tile,
        "patch_size": PATCH,
    }
    image_id = words.convert_tokens_to_ids("<image>")
    sizes: dict[str, Any] = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}}
    config_class, model_class = (
        (Idefics3Config, Idefics3ForConditionalGeneration)
        if family == "idefics3"
        else (SmolVLMConfig, SmolVLMForConditionalGeneration)
    )
    config = config_class(
        text_config=text,
        vision_config=vision,
        scale_factor=scale,
        image_token_id=image_id,
        pad_token_id=words.pad_token_id,
    )
    model = model_class(config)
    spread(model, seed)
    model.generation_config.update(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    parts: dict[str, Any] = {"tokenizer": words, "image_seq_len": (tile // PATCH // scale) ** 2}
    template = TEMPLATE % first
    if family == "idefics3":
        return model, Idefics3Processor(Idefics3ImageProcessor(**sizes), chat_template=template, **parts)
    videos = SmolVLMVideoProcessor(
        **sizes, video_sampling={"max_frames": 4, "fps": 1, "video_size": {"longest_edge": tile}}
    )
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes), video_processor=videos, chat_template=template, **parts
    )
    return model, processor
