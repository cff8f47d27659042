"""Tiny InternVL: tiles of 32 x 32 pixels, 4 x 4 patches shuffled into 2 x 2 tokens; six tiles at most, a thumbnail."""

from __future__ import annotations

from typing import Any

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
)

from families.parts import spread, tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
#: InternVL3-hf's: images and texts in the order given, an image on a line of its own
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
TILE, SIDE, MOST = 32, 2, 6


def build(family: str, seed: int) -> tuple[Any, Any]:
    """A model and its processor."""
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(SPECIAL, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=names)
    ids = {name: words.convert_tokens_to_ids(name) for name in SPECIAL}
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(words),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": 8,
        },
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=SIDE**2,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    spread(model, seed)
    model.generation_config.update(eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    size = {"height": TILE, "width": TILE}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=MOST),
        tokenizer=words,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=SIDE**2,
        chat_template=TEMPLATE,
    )
    return model, processor
