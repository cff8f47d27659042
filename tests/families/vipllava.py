"""Tiny ViP-LLaVA: the middle square of an image, 32 x 32 pixels, 4 x 4 tokens. laavit has no family for it."""

from __future__ import annotations

from typing import Any

from transformers import CLIPImageProcessor, LlavaProcessor, VipLlavaConfig, VipLlavaForConditionalGeneration

from families.parts import spread, tokenizer

SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
#: vip-llava-hf's way, for system prompts too: roles in capitals, images first
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SIZE, PATCH = 32, 8


def build(seed: int = 0) -> tuple[Any, Any]:
    """A model and its processor."""
    words = tokenizer(SPECIAL, bos="<s>", writes_bos=True, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = VipLlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(words),
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            **shape,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "num_hidden_layers": 2,
            "image_size": SIZE,
            "patch_size": PATCH,
            **shape,
        },
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=[-1, -2],
        image_seq_length=16,
    )
    model = VipLlavaForConditionalGeneration(config)
    spread(model, seed)
    model.generation_config.update(
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, resample=0
        ),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )
    return model, processor
