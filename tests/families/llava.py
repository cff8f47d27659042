"""Tiny LLaVA-1.5: a CLIP of 4 x 4 patches on the centre of the image, the last layer but one, a Llama."""

from __future__ import annotations

from typing import Any

from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from families.parts import spread, tokenizer

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
#: llava-1.5-hf's: every image first, no end of turn
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TILE, PATCH = 32, 8


def build(family: str, seed: int) -> tuple[Any, Any]:
    """A model and its processor."""
    words = tokenizer(SPECIAL, bos="<s>", writes_bos=True, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    ids = {name: words.convert_tokens_to_ids(name) for name in SPECIAL}
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(words),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
        },
        image_token_index=ids["<image>"],
        image_seq_length=(TILE // PATCH) ** 2,
    )
    model = LlavaForConditionalGeneration(config)
    spread(model, seed)
    model.generation_config.update(eos_token_id=ids["</s>"], pad_token_id=ids["<pad>"])
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, do_center_crop=True
        ),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return model, processor
