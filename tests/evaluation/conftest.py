"""A tiny random Qwen2.5-VL with a real processor, written as an export; and micro-lab and BLINK data to ask it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from laavit.evaluation.bridge import Laavit, Settings

LATENTS = 4
SYSTEM = "look first"
WORDS = [
    *["what", "colour", "is", "left", "of", "the", "red", "blue", "green", "circle", "square", "how", "many"],
    *"?AB().,",
    *["yes", "no", "look"],
]
WORDS += ["first", "one", "two"]
MARKUP = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "system",
    "user",
    "assistant",
    "\n",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nLATENTS{% endif %}"
)


def _tokenizer(latents: int) -> PreTrainedTokenizerFast:
    names = [f"<|latent_{i}|>" for i in range(1, latents + 1)] + (["<|latent_end|>"] if latents else [])
    markup = [*MARKUP, *names]
    vocabulary = {word: i for i, word in enumerate(["<unk>", *markup, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    inner.decoder = decoders.WordPiece(prefix="##")  # joins words with single spaces
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": markup})
    return tokenizer


def write_model(folder: Path, latents: int = LATENTS, seed: int = 0) -> Path:
    """A checkpoint folder as tools/export.py writes it (``latents=0``: a stock checkpoint without ``laavit.json``)."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(latents)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in MARKUP}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "initializer_range": 0.5,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": 32,
            "window_size": 32,
            "fullatt_block_indexes": [0],
            "initializer_range": 0.5,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        bos_token_id=None,
        eos_token_id=ids["<|im_end|>"],
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():  # says words and <|im_end|> only: a written image token would need an image
        model.lm_head.weight[: ids["<|im_end|>"]] = 0
        model.lm_head.weight[ids["<|im_end|>"] + 1 : tokenizer.convert_tokens_to_ids(WORDS[0])] = 0
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    written = "".join(f"<|latent_{i}|>" for i in range(1, latents + 1)) + ("<|latent_end|>" if latents else "")
    template = TEMPLATE.replace("LATENTS", written)
    sizes = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=8, merge_size=2),
        chat_template=template,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if latents:
        stored = {"system": SYSTEM, "latents": latents, "separator": "<|latent_end|>"}
        (folder / "laavit.json").write_text(json.dumps(stored))
    return folder


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> Pictures.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Pictures.fromarray(pixels.to(torch.uint8).numpy())


def _stored(image: Pictures.Image | None) -> dict | None:
    if image is None:
        return None
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return {"bytes": stream.getvalue(), "path": None}


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("stock"), latents=0)


def chat(question: str, *images: Pictures.Image) -> list[dict]:
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


QUESTIONS = ("what colour is left of the red circle ?", "how many ?", "is the square left of the circle ?")
KINDS = ("colour", "count", "relation")


@pytest.fixture(scope="session")
def microlab_data(tmp_path_factory: pytest.TempPathFactory, export: Path) -> Path:
    """24 questions of unequal length about 8 scenes; every second gold answer is what ``export`` answers to it."""
    folder = tmp_path_factory.mktemp("data") / "eval"
    folder.mkdir()
    model = Laavit(str(export))
    rows = []
    for i in range(24):
        [answer] = model.answer([chat(QUESTIONS[i % 3], picture(i // 3))], Settings(4, ("\n\n",)))
        rows.append(
            {
                "id": f"q{i:03d}",
                "image": _stored(picture(i // 3)),
                "question": QUESTIONS[i % 3],
                "answer": f" {answer.text.upper()}." if i % 2 else "never said",
                "kind": KINDS[i % 3],
            }
        )
    text = Value("string")
    features = Features({"id": text, "image": Image(), "question": text, "answer": text, "kind": text})
    for split in ("test", "validation"):
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
        rows = rows[:6]
    return folder


@pytest.fixture(scope="session")
def blink_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with BLINK as it is published: one parquet a config and split, configs named by the README."""
    root = tmp_path_factory.mktemp("root")
    folder = root / "BLINK"
    (folder / "Relative_Depth").mkdir(parents=True)
    rows = [
        {
            "idx": f"val_Relative_Depth_{i + 1}",
            "question": "which point is closer ?",
            "sub_task": "Relative_Depth",
            "prompt": "which point is closer ? ( A ) A ( B ) B",
            "answer": ("(A)", "(B)")[i % 2],
            "explanation": "",
            "choices": ["A is closer", "B is closer"],
            "image_1": _stored(picture(100 + i)),
            "image_2": _stored(picture(200 + i, (32, 32))) if i == 2 else None,
            "image_3": None,
            "image_4": None,
        }
        for i in range(5)
    ]
    text = Value("string")
    features = Features(
        dict.fromkeys(("idx", "question", "sub_task", "prompt", "answer", "explanation"), text)
        | {"choices": List(text)}
        | {f"image_{i}": Image() for i in range(1, 5)}
    )
    Dataset.from_list(rows, features=features).to_parquet(folder / "Relative_Depth" / "val-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: Relative_Depth\n  data_files:\n"
        "  - split: val\n    path: Relative_Depth/val-*\n---\n"
    )
    return root
