"""The micro-lab's scenes on disk, in the published Visual-CoT format, and as parquet for lmms-eval.

    ROOT/train.json  val.json  test.json     Visual-CoT records, image paths relative to ROOT/images
    ROOT/images/<split>/000000.png
    ROOT/eval/{val,test}-00000-of-00001.parquet   id, image, question, answer, kind, boxes
    ROOT/eval/README.md                       the configuration `datasets` reads
    ROOT/dataset.json                         what was asked for, and the hash of every file above: written last
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from laavit.microlab.questions import QUESTION_KINDS, Question, ask
from laavit.microlab.scenes import IMAGE_SIZE, make_scene, render
from laavit.registry import UserError

logger = logging.getLogger(__name__)

#: The seed of a split's scenes; no two splits, and neither of the pre-training sets, share one.
SPLIT_SEEDS = {"train": 101, "val": 102, "test": 103}
BOX_REQUEST = " Please provide the bounding box coordinate of the region that can help you answer the question better."
COLUMNS = Features(
    {
        "id": Value("string"),
        "image": ImageFeature(),
        "question": Value("string"),
        "answer": Value("string"),
        "kind": Value("string"),
        "boxes": List(List(Value("float32"))),
    }
)


@dataclass(frozen=True)
class DatasetSettings:
    """How many scenes a split has; each is asked one question of every kind.

    Args:
        train, val, test: scenes. kinds: question kinds; empty for all.
    """

    train: int = 1000
    val: int = 150
    test: int = 500
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.train, self.val, self.test) < 1:
            raise UserError(f"every split of the micro-lab has at least one scene, got {self}")


def visual_cot_record(identity: int, split: str, path: str, question: Question) -> dict[str, Any]:
    """One question as a four-turn Visual-CoT record; several boxes are several ``path###[...]`` entries."""
    boxes = [[x / IMAGE_SIZE for x in box] for box in question.boxes]
    written = ", ".join("[" + ", ".join(f"{x:.3f}" for x in box) + "]" for box in boxes)
    return {
        "question_id": identity,
        "dataset": f"microlab_{question.kind}",
        "split": split,
        "image": [path, *[f"{path}###{list(box)}" for box in question.boxes]],
        "conversations": [
            {"from": "human", "value": question.text + BOX_REQUEST},
            {"from": "gpt", "value": written},
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": question.answer},
        ],
    }


def write_dataset(root: str | Path, settings: DatasetSettings | None = None) -> Path:
    """Write the three splits; a folder that holds them already (same settings, complete) is left alone.

    Raises:
        UserError: the folder holds a data set of other settings.
    """
    root, settings = Path(root), settings or DatasetSettings()
    marker, wanted = root / "dataset.json", json.loads(json.dumps(asdict(settings)))
    if marker.is_file():
        if json.loads(marker.read_text(encoding="utf-8"))["settings"] != wanted:
            raise UserError(f"'{root}' holds a micro-lab data set of other settings; name another folder or remove it")
        return root
    kinds = list(settings.kinds) or list(QUESTION_KINDS)
    hashes: dict[str, str] = {}
    for split, seed in SPLIT_SEEDS.items():
        records, rows = [], []
        for record, row in _split(root, split, seed, getattr(settings, split), kinds):
            records.append(record)
            rows.append(row)
        hashes[f"{split}.json"] = _write(root / f"{split}.json", json.dumps(records, indent=0).encode())
        if split != "train":
            buffer = io.BytesIO()
            Dataset.from_list(rows, features=COLUMNS).to_parquet(buffer)
            name = f"eval/{split}-00000-of-00001.parquet"
            hashes[name] = _write(root / name, buffer.getvalue())
        logger.info("micro-lab %s: %d scenes, %d questions", split, getattr(settings, split), len(records))
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: validation\n    path: val-*\n  - split: test\n    path: test-*\n---\n"
    _write(root / "eval/README.md", (card + "\n# Micro-lab questions\n\nMade by laavit/microlab/dataset.py.\n").encode())
    _write(marker, json.dumps({"settings": wanted, "sha256": hashes}, indent=2).encode())
    return root


def _split(root: Path, split: str, seed: int, scenes: int, kinds: list[str]) -> Iterator[tuple[dict, dict]]:
    for index in range(scenes):
        scene = make_scene(seed, index)
        buffer = io.BytesIO()
        Image.fromarray(render(scene)).save(buffer, "PNG")
        path = f"{split}/{index:06d}.png"
        _write(root / "images" / path, buffer.getvalue())
        for number, question in enumerate(ask(scene, kinds)):
            identity = (seed * 100_000 + index) * 100 + number
            row = {
                "id": str(identity),
                "image": {"bytes": buffer.getvalue(), "path": path},
                "question": question.text,
                "answer": question.answer,
                "kind": question.kind,
                "boxes": [[x / IMAGE_SIZE for x in box] for box in question.boxes],
            }
            yield visual_cot_record(identity, split, path, question), row


def _write(path: Path, content: bytes) -> str:
    """Write atomically; returns the content's SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return hashlib.sha256(content).hexdigest()
