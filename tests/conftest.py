"""A tiny random Qwen2.5-VL with a real tokenizer, processor and chat template, shared by the tests of the core."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from laavit.backbones import PromptSettings, collate
from laavit.cli import run as cli_run
from laavit.gates import Gate
from laavit.latents import LearnedLatents
from laavit.model import LaViT
from laavit.structures import Batch, Box, Encoded, Sample, Tile, Trace
from laavit.students import HFStudent
from laavit.targets import ConceptTarget, Target, TrajectoryTarget
from laavit.targets.base import stack

#: tests of minutes, which would otherwise be left to one worker at the end
LONG = ("test_readme.py", "test_bench.py", "test_split.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first; all others in their order."""
    items.sort(key=lambda item: item.path.name not in LONG)


SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CORPUS = [
    "system user assistant You are a helpful assistant. What colour is the shape left of the red circle? blue yes no"
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def write_tiny_model(folder: Path, layers: int = 3, seed: int = 0, spare: int = 32) -> Path:
    """A random Qwen2.5-VL folder: text 32 x ``layers``, vision 32 x 2, patch 8, merge 2, ``spare`` embedding rows."""
    tokenizer = tiny_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    text = {
        "vocab_size": len(tokenizer) + spare,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "initializer_range": 0.4,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": 32,
        "window_size": 32,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.4,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=8, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 128 * 128}
        ),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=8, merge_size=2),
        chat_template=TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indexes of data sets are kept in a folder of the tests', for the commands that they start, too."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LAAVIT_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def write_tiny() -> Callable[..., Path]:
    """``write_tiny_model``, for tests that need another size."""
    return write_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three images of different sizes: 48 x 32, 64 x 48 and 32 x 80 pixels."""
    folder, random, paths = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for index, (width, height) in enumerate([(48, 32), (64, 48), (32, 80)]):
        path = folder / f"{index}.png"
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def samples(pictures: list[Path]) -> list[Sample]:
    """Three samples: unequal grids, and one with two images."""
    box = (Box(0.1, 0.2, 0.6, 0.9),)
    return [
        Sample("a", (pictures[0],), "What colour is the shape?", "blue", box),
        Sample("b", (pictures[1],), "What is left of the red circle?", "the blue shape", box),
        Sample("c", (pictures[2], pictures[0]), "yes or no?", "no", box),
    ]


def plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """transformers' eager attention, but for its softmax in float32: whole maps [B, H, S, S], additive masks."""
    groups = module.num_key_value_groups
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    length = query.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, -torch.inf) if attention_mask is None else scores + attention_mask
    weights = scores.softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), weights


AttentionInterface.register("plain", plain_attention)
AttentionMaskInterface.register("plain", eager_mask)


class Lab:
    """Tiny float64 models, traces and batches, put together without a recipe.

    Args:
        folder: a tiny model. width: of the traces' semantics, D_t.
    """

    def __init__(self, folder: Path, width: int = 24) -> None:
        self.folder, self.width = folder, width

    def student(
        self,
        latents: int | tuple[int, int] = 4,
        freeze: Sequence[str] = ("vision",),
        folder: Path | None = None,
        dtype: str = "float64",
        init: str = "mean",
        noise: float = 0.5,
        **given: Any,
    ) -> HFStudent:
        student = HFStudent(str(folder or self.folder), dtype, freeze)
        generator = torch.Generator().manual_seed(3)
        student.setup(LearnedLatents(latents, init, noise, **given) if latents else None, generator)
        return student

    def model(
        self,
        targets: Mapping[str, Target] | None = None,
        gate: Gate | None = None,
        student: HFStudent | None = None,
    ) -> LaViT:
        """A LaViT in training mode; ``targets=None`` gives concept and trajectory."""
        student = student or self.student()
        targets = {"concept": ConceptTarget(), "trajectory": TrajectoryTarget()} if targets is None else targets
        torch.manual_seed(5)
        for target in targets.values():
            target.setup(student.backbone.width, student.backbone.depth, student.latents, {"width": self.width})
        return LaViT(student, gate, targets).to(next(student.parameters()).dtype).train()

    @staticmethod
    def eager(model: LaViT) -> Qwen2_5_VLForConditionalGeneration:
        """The same weights in an eager attention that returns whole maps and keeps float64."""
        twin = copy.deepcopy(model.student.model).train()
        twin.set_attn_implementation({"text_config": "plain", "vision_config": "sdpa"})
        return twin

    def encode(self, model: LaViT, samples: Sequence[Sample], order: str = "image_first") -> list[Encoded]:
        builder = model.student.builder(PromptSettings(system="You are a helpful assistant.", order=order))
        return [builder.encode(sample, sample.answer) for sample in samples]

    def trace(self, sample: Sample, seed: int = 0) -> Trace:
        """A random trace over a finer grid than the student's: 4 x 5 tokens an image."""
        generator = torch.Generator().manual_seed(seed + sum(map(ord, sample.id)))
        tiles = tuple(Tile(4, 5, image) for image in range(len(sample.images)))
        gaze = torch.rand(20 * len(tiles), generator=generator, dtype=torch.float64).square()
        semantics = torch.randn(self.width, generator=generator, dtype=torch.float64)
        return Trace(sample.id, sample.answer, tiles, gaze / 20, semantics, float(gaze.sum() / 20))

    def batch(
        self,
        model: LaViT,
        samples: Sequence[Sample],
        order: str = "image_first",
        items: Sequence[Encoded] | None = None,
    ) -> Batch:
        items = items or self.encode(model, samples, order)
        batch = collate(items, model.student.backbone.family, model.student.backbone.tokenizer.pad_token_id)
        for name, target in model.named_targets.items():
            batch.targets[name] = stack([target.prepare(item, self.trace(item.sample)) for item in items])
        return batch


@pytest.fixture(scope="session")
def lab(tiny_folder: Path) -> Lab:
    return Lab(tiny_folder)


@pytest.fixture(scope="session")
def whole_lab(tiny_folder: Path) -> Lab:
    """The same under a name that tests of the engine, whose ``lab`` is another one, can ask for."""
    return Lab(tiny_folder)


RECIPE = """
student = dict(name="hf", path={model!r})
teacher = dict(name="hf", path={model!r})
latents = dict(name="learned", count=4, noise=0.5)
gate = dict(name="cosine", warmup=2)
targets = dict(concept="concept", trajectory="trajectory")
filters = dict(alignment=dict(name="alignment", minimum=0.05))
data = dict(name="visual_cot", annotations={annotations!r}, root={root!r})
prompt = dict(system="You look closely.")
traces = dict(path={traces!r})
extract = dict(answer="gold", batch_size=2, shard_size=4)
train = dict(steps=3, batch_size=2, lr=3e-3, warmup_ratio=0.0, checkpoint_every=2, tensorboard=False, device="cpu")
"""


def write_project(folder: Path, model: Path, pictures: Sequence[Path]) -> Path:
    """A data set in the published form, its images, and a recipe ``cfg.py`` over a tiny model; returns the recipe."""
    (folder / "images").mkdir(parents=True)
    records = []
    for index, picture in enumerate(pictures):
        shutil.copy(picture, folder / "images" / picture.name)
        for number, (question, answer) in enumerate([("What colour is the shape?", "blue"), ("yes or no?", "no")]):
            records.append(
                {
                    "question_id": 10 * index + number,
                    "dataset": "gqa",
                    "split": "train",
                    "image": [picture.name],
                    "conversations": [
                        {"from": "human", "value": f"<image>\n{question}"},
                        {"from": "gpt", "value": f"<answer> {answer} </answer>"},
                    ],
                    "bboxes": [[0.1, 0.2, 0.6, 0.9]],
                }
            )
    (folder / "data.json").write_text(json.dumps(records))
    places = {"annotations": folder / "data.json", "root": folder / "images", "traces": folder / "traces"}
    text = RECIPE.format(model=str(model), **{name: str(place) for name, place in places.items()})
    (folder / "cfg.py").write_text(text)
    return folder / "cfg.py"


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, pictures: list[Path]) -> Path:
    """A recipe whose traces are extracted; treat as read-only."""
    recipe = write_project(tmp_path_factory.mktemp("project") / "p", tiny_folder, pictures)
    assert cli_run("extract", [str(recipe)]) == 0
    return recipe


@pytest.fixture(scope="session")
def trained(project: Path) -> Path:
    """A run folder of that recipe; treat as read-only."""
    run = project.parent / "run"
    assert cli_run("train", [str(project), "--work-dir", str(run)]) == 0
    return run


@pytest.fixture
def own_project(tmp_path: Path, tiny_folder: Path, pictures: list[Path]) -> Path:
    """A recipe without traces, in a folder of one's own."""
    return write_project(tmp_path / "own", tiny_folder, pictures)
