"""A vision tower, a projector and a causal language model as one stock LLaVA of transformers.

Nothing of the result is laavit's own: ``LlavaForConditionalGeneration`` and ``LlavaProcessor`` save it as one folder
and open it again. Around the language model's chat template stands what lets it take images.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from laavit.attention import IMPLEMENTATION, AttentionContext
from laavit.backbones.loading import reading
from laavit.backbones.towers import Tower
from laavit.backbones.vit import prefix_tokens
from laavit.registry import UserError

IMAGE_TOKEN = "<image>"
#: Contents in parts become texts, an image its token on a line of its own, before a template that knows texts alone.
FLATTEN = (
    "{%- set flat = namespace(chat=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message.content is defined and message.content is iterable and message.content is not string -%}"
    "{%- set flat.text = '' -%}"
    "{%- for part in message.content -%}"
    "{%- set flat.text = flat.text + (IMAGE + '\\n' if part.type == 'image' else part.text) -%}"
    "{%- endfor -%}"
    "{%- set message = dict(message, content=flat.text) -%}"
    "{%- endif -%}"
    "{%- set flat.chat = flat.chat + [message] -%}"
    "{%- endfor -%}"
)
#: for a template without a system role: what is said in it goes before the first words of the user
FOLD = (
    "{%- if flat.chat[0].role == 'system' and flat.chat | length > 1 -%}"
    "{%- set text = flat.chat[0].content + '\\n\\n' + flat.chat[1].content -%}"
    "{%- set flat.chat = [dict(flat.chat[1], content=text)] + flat.chat[2:] -%}"
    "{%- endif -%}"
)
TAKE = "{%- set messages = flat.chat %}"


def open_language(path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A causal language model, with transformers' plain attention, and its tokenizer, with the image token.

    Args:
        path: folder, hub name or ``zoo:NAME``.

    Raises:
        UserError: none can be read there, or its tokenizer has no chat template.
    """
    with reading(path, "causal language model") as place:
        words: Any = AutoTokenizer.from_pretrained(place)
        if not words.chat_template:
            raise UserError("its tokenizer has no chat template; take the model that was trained to chat")
        model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, attn_implementation="eager")
        if not hasattr(model.base_model, "embed_tokens"):
            raise UserError(f"a {type(model).__name__} cannot be the language model of a LLaVA")
    words.chat_template = image_template(words)
    words.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if words.pad_token is None:
        words.pad_token = words.eos_token  # nothing looks at padding
    return model, words


def image_template(words: Any) -> str:
    """A tokenizer's chat template, to take contents in parts, and images among them.

    Turns, their ends and the generation prompt stay the template's own, and so does the system prompt where it has one.
    """
    template: str = words.get_chat_template()
    system = {"role": "system", "content": "s"}
    try:
        words.apply_chat_template([system, {"role": "user", "content": "u"}], tokenize=False)
        fold = ""
    except TemplateError:
        fold = FOLD
    return FLATTEN.replace("IMAGE", json.dumps(IMAGE_TOKEN)) + fold + TAKE + template


def compose(tower: Tower, model: Any, words: Any, layer: int = -2, projector: str = "gelu") -> tuple[Any, Any]:
    """A LLaVA of a tower and a language model, whose weights it takes over, and its processor.

    Args:
        model, words: as ``open_language`` gives them.
        layer: of the tower, whose states are read; -1 is the last one, before its norm.
        projector: activation between the projector's two new linear layers.

    Raises:
        UserError: the tower has no such layer, or the language model does more than LLaVA's own parts can do.
    """
    vision, depth = tower.model.config, tower.model.config.num_hidden_layers
    if not -depth - 1 <= layer <= depth:
        raise UserError(f"student.layer: got {layer}; the tower has layers 1 to {depth} (or -{depth} to -1)")
    prefix = prefix_tokens(vision)
    strategy = "default" if prefix else "full"
    image_id = words.convert_tokens_to_ids(IMAGE_TOKEN)
    config = LlavaConfig(
        vision_config=vision,
        text_config=model.config,
        image_token_index=image_id,
        image_seq_length=(tower.side // tower.patch) ** 2,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        projector_hidden_act=projector,
    )
    with torch.device("meta"):
        whole: Any = LlavaForConditionalGeneration(config)
    dtype = model.dtype
    new = type(whole.model.multi_modal_projector)(config)
    for part in (new.linear_1, new.linear_2):  # as transformers starts a new LLaVA
        nn.init.normal_(part.weight, std=getattr(model.config, "initializer_range", 0.02))
        nn.init.zeros_(part.bias)
    whole.model.vision_tower, whole.model.multi_modal_projector = tower.model.to(dtype), new.to(dtype)
    _take_over(whole, model, words)
    if image_id >= model.config.vocab_size:
        whole.resize_token_embeddings(image_id + 1, mean_resizing=False)
    whole.generation_config = model.generation_config
    images = CLIPImageProcessor(
        size={"height": tower.side, "width": tower.side},
        crop_size={"height": tower.side, "width": tower.side},
        do_center_crop=False,  # all of the image is seen
        image_mean=list(tower.mean),
        image_std=list(tower.std),
        resample=tower.resample,
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=tower.patch,
        vision_feature_select_strategy=strategy,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=prefix,
        chat_template=words.chat_template,
    )
    return whole, processor


@torch.no_grad()
def _take_over(whole: Any, model: Any, words: Any) -> None:
    """Put a language model into a LLaVA, and compare the two on a few words.

    Raises:
        UserError: it is of another make, LLaVA says something else, or a layer attends in a way that no gate and no
            target can reach.
    """
    kind, inner = type(model).__name__, model.base_model
    if type(inner) is not type(whole.model.language_model):
        raise UserError(f"a {kind} cannot be the language model of a LLaVA")
    ids = torch.tensor([words.encode("What is in the image?", add_special_tokens=False)])
    own = model.eval()(ids, use_cache=False).logits  # before its attention is another one
    whole.model.language_model = inner
    whole.lm_head.weight = model.get_output_embeddings().weight
    whole.set_attn_implementation({"text_config": IMPLEMENTATION, "vision_config": "sdpa"})
    context = AttentionContext(rows=torch.tensor([[ids.shape[1] - 1]]))
    try:
        found = whole.eval()(ids, use_cache=False, laavit=context).logits
    except ValueError as error:
        raise UserError(f"a {kind} does not run laavit's attention: {error}") from None
    rounding = 1e-3 if own.dtype in (torch.float32, torch.float64) else 0.05
    if (own - found).abs().max() > rounding * own.abs().max():
        raise UserError(
            f"a {kind} says something else as the language model of a LLaVA: it scales or caps its logits, adds a bias "
            "to them, or attends in another way"
        )
    silent = set(range(model.config.num_hidden_layers)) - set(context.recorded)
    if silent:
        raise UserError(f"layer {min(silent)} of a {kind} runs no attention that a gate or a target can reach")
