"""Recipes that combine every part with every other: students, latent modes, gates, targets, and a data set for them.

``cells()`` are the combinations; a ``World`` writes what they need (tiny models, four samples with and without boxes,
traces that hold whatever any target asks for) and gives the recipe of a cell as plain data.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import FAMILY_NAMES, tiny
from families.parts import spread, tokenizer
from PIL import Image
from transformers import Qwen2Config, Qwen2ForCausalLM

from laavit.backbones import PromptSettings
from laavit.commands.common import file_digest
from laavit.recipe import Recipe, apply_overrides, cards
from laavit.structures import AnswerLogits, Sample, Step, Tile, Trace
from laavit.targets import Target
from laavit.traces.store import TraceWriter

SYSTEM = "Look closely."
#: width, height of the four images
SIZES = ((48, 32), (64, 48), (32, 80), (40, 40))
QUESTIONS = (
    ("What colour is the shape?", "blue"),
    ("What is left of the red circle?", "the blue shape"),
    ("yes or no?", "no"),
    ("Is it a circle?", "yes"),
)
#: of a store that holds all that any target asks for
HEADER = {
    "width": 24,
    "static": "cls",
    "settings": {
        "semantics": "full",
        "top_k": 8,
        "steps": "token",
        "step_rows": "predicting",
        "answer": "gold",
        "logits": 5,
    },
}
#: the students of the matrix: the family of a tiny model ('' is composed), and what else a recipe says of it
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"name": "hf"}) for name in FAMILY_NAMES},
    "lora": ("qwen2_5_vl", {"name": "hf", "lora": {"rank": 2, "targets": ["decoder", "projector"]}}),
    "composed": (
        "",
        {
            "type": "ComposedStudent",
            "tower": "timm:vit_tiny_patch16_224",
            "options": {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2},
            "pretrained": False,
            "image_size": 32,
        },
    ),
}
CHAT = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
#: ways to have latents -> names in registry/latents that take turns; any further name is a way of its own
WAYS = {
    "none": ("",),
    "learned": ("learned", "learned_random", "learned_token"),
    "varying": ("varying",),
    "emitted": ("emitted", "emitted_varying"),
    "feedback": ("feedback",),
}
MODES: dict[str, tuple[str, ...]] = {
    **WAYS,
    **{name: (name,) for name in cards("latents") if name not in {each for names in WAYS.values() for each in names}},
}
#: arguments of gates, so that three steps see them open
GATES: dict[str, dict[str, Any]] = {
    "paths": {"answer": {"name": "cosine", "warmup": 2}, "question": {"name": "hard", "warmup": 1}},
    **{name: {"warmup": 2} for name in ("cosine", "linear", "exponential", "sigmoid", "step", "hard")},
}
#: what else a run can have, over the plain settings of ``World.recipe``
EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"train.gradient_checkpointing": True},
    {"train.precision": "bf16"},
    {"train.accumulate": 2, "train.batch_size": 4},
    {"student.freeze": ["vision", "embeddings"]},
    {"prompt.order": "question_first"},
    {"traces.keep": True, "prompt.suffix": " One word."},
)


@dataclass(frozen=True)
class Cell:
    """One combination, by names. latents, gate: '' is none. extra: overrides."""

    student: str
    latents: str
    gate: str
    targets: tuple[str, ...]
    extra: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join((self.student, self.latents or "none", self.gate or "none", *self.targets))


@cache
def target_of(name: str) -> Target:
    """A registered target as its name builds it; for what it says of itself."""
    target: Target = Recipe({"targets": {"t": name}}).build("targets.t")
    return target


def fits(latents: str, gate: str, targets: Sequence[str], extra: Mapping[str, Any]) -> bool:
    """Whether a combination makes sense; ``laavit.compatibility`` says so too, in the tests."""
    parts = [target_of(name) for name in targets]
    if not latents and any(part.needs_latents for part in parts):
        return False
    if gate == "closed" and any(part.rows for part in parts):
        return False
    return not (extra.get("prompt.order") == "question_first" and any("question" in part.rows for part in parts))


def pairwise() -> list[Cell]:
    """Every student in every latent mode once; gates, targets and settings take turns, the least used ones first."""
    used: Counter[str] = Counter()
    return [_next(student, mode, used) for student, mode in product(STUDENTS, MODES)]


def _next(student: str, mode: str, used: Counter[str]) -> Cell:
    def least(options: Iterable[Any], suits: Callable[[Any], bool]) -> Any:
        found = min((option for option in options if suits(option)), key=lambda option: used[str(option)])
        used[str(found)] += 1
        return found

    latents = least(MODES[mode], lambda name: True)
    first = least(cards("targets"), lambda name: fits(latents, "", (name,), {}))
    second = least(cards("targets"), lambda name: name != first and fits(latents, "", (name,), {}))
    gate = least(cards("gates"), lambda name: fits(latents, name, (first, second), {}))
    extra = least(EXTRAS, lambda more: fits(latents, gate, (first, second), more))
    return Cell(student, latents, gate, (first, second), tuple(extra.items()))


def every() -> Iterator[Cell]:
    """The whole product: students, latent modes, two gates, two targets."""
    for student, mode, gate, place in product(STUDENTS, MODES, ("cosine", "hard"), (0, 1)):
        names = ("trajectory_no_latents", "box_no_latents") if mode == "none" else ("concept", "trajectory")
        yield Cell(student, MODES[mode][0], gate, (names[place],))


class World:
    """A folder with models, data and traces.

    Args:
        folder: where to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, random = folder, np.random.default_rng(0)
        (folder / "images").mkdir(parents=True)
        for number, (width, height) in enumerate(SIZES):
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        #: two samples of one image and two of two; and four of one image, with boxes
        self.plain = self._annotate("plain", [("0",), ("1",), ("2", "0"), ("3", "1")])
        self.boxed = self._annotate("boxed", [("0",), ("1",), ("2",), ("3",)], [[0.1, 0.2, 0.6, 0.9]])
        self._stores: dict[tuple[str, Path], Path] = {}

    def _annotate(self, name: str, images: Sequence[tuple[str, ...]], boxes: list[list[float]] | None = None) -> Path:
        records = []
        for number, (own, (question, answer)) in enumerate(zip(images, QUESTIONS, strict=True)):
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            record = {"id": f"s{number}", "image": [f"{one}.png" for one in own], "conversations": turns}
            records.append(record | ({"bboxes": boxes} if boxes else {}))
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(records))
        return path

    def student(self, name: str) -> dict[str, Any]:
        """A student as a recipe names it; its tiny model is written where it is not there yet."""
        family, spec = STUDENTS[name]
        folder = self.folder / (family or "language")
        if not folder.exists():
            tiny(family, folder) if family else write_language(folder)
        return spec | {"path" if family else "language": str(folder)}

    def data(self, cell: Cell) -> Path:
        """With boxes where a target needs them; otherwise with samples of two images."""
        return self.boxed if any(target_of(name).needs_boxes for name in cell.targets) else self.plain

    def store(self, student: str, data: Path) -> Path:
        """Traces of a data set, by a teacher with the student's tokenizer."""
        key = STUDENTS[student][0], data
        if key not in self._stores:
            path = self.folder / f"traces-{student}-{data.stem}"
            samples = Recipe({"data": self._data(data)}).build("data")
            builder = Recipe({"student": self.student(student)}).build("student").builder(PromptSettings(system=SYSTEM))
            header = HEADER | {"data": {"annotations_sha256": file_digest(data)}}
            with TraceWriter(path, header, shard_size=8) as writer:
                for number, sample in enumerate(samples):
                    writer.append(trace(sample, builder.encode(sample, sample.answer).labels, number))
            self._stores[key] = path
        return self._stores[key]

    def _data(self, data: Path) -> dict[str, Any]:
        return {"name": "llava", "annotations": str(data), "root": str(self.folder / "images")}

    def recipe(self, cell: Cell) -> dict[str, Any]:
        """A cell's recipe as plain data."""
        data = self.data(cell)
        raw: dict[str, Any] = {
            "student": self.student(cell.student),
            "latents": cell.latents or None,
            "gate": {"name": cell.gate, **GATES.get(cell.gate, {})} if cell.gate else None,
            "targets": {f"t{number}": name for number, name in enumerate(cell.targets)},
            "data": self._data(data),
            "prompt": {"system": SYSTEM},
            "traces": {"path": str(self.store(cell.student, data))},
            "train": {
                "steps": 3, "batch_size": 2, "lr": 3e-3, "warmup_ratio": 0.0, "checkpoint_every": 2, "keep_last": 0,
                "log_every": 1, "tensorboard": False, "device": "cpu",
            },
        }  # fmt: skip
        return apply_overrides(raw, dict(cell.extra))


def write_language(folder: Path) -> None:
    """A tiny causal language model that chats."""
    words = tokenizer(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    words.chat_template = CHAT
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(words), num_key_value_heads=2, **shape))
    spread(model, 1)
    model.generation_config.update(eos_token_id=words.eos_token_id)
    for part in (model, words):
        part.save_pretrained(folder)


def trace(sample: Sample, labels: torch.Tensor, seed: int) -> Trace:
    """A trace with whatever a target can ask for, over 4 x 5 tokens an image."""
    generator = torch.Generator().manual_seed(seed)
    tiles = tuple(Tile(4, 5, image) for image in range(len(sample.images)))
    cells = 20 * len(tiles)
    words = int((labels >= 0).sum())
    gaze = torch.rand(words, cells, generator=generator).square()
    kept = torch.randn(words, 300, generator=generator).log_softmax(-1).topk(5)
    return Trace(
        sample_id=sample.id,
        answer=sample.answer,
        tiles=tiles,
        gaze=gaze.mean(0) / cells,
        semantics=torch.randn(cells, HEADER["width"], generator=generator),
        mass=0.5,
        semantic_tokens=torch.arange(cells),
        steps=tuple(Step("word", "object", each) for each in gaze[:-1]),
        logits=AnswerLogits(labels[labels >= 0], kept.indices, kept.values),
    )
