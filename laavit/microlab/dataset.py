"""The micro-lab's scenes on disk, in the published Visual-CoT format, and as parquet for lmms-eval.

ROOT/train.json  val.json  test.json     Visual-CoT records, image paths relative to ROOT/images
ROOT/images/<split>/000000.png
ROOT/eval/{val,test}-00000-of-00001.parquet   id, image, question, answer, kind, boxes (in the order of their hops)
ROOT/eval/README.md                       the configuration `datasets` reads
ROOT/dataset.json                         what was asked for, and the hash of every file above: written last
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from rich.progress import track

from laavit.files import write_bytes
from laavit.microlab.questions import HOP_KINDS, QUESTION_KINDS, Question, ask, has_hops
from laavit.microlab.scenes import IMAGE_SIZE, SCENES_VERSION, Scene, make_scene, render
from laavit.registry import UserError, nearest

logger = logging.getLogger(__name__)

#: The seed of a split's scenes; no two splits, and neither of the pre-training sets, share one.
SPLIT_SEEDS = {"train": 101, "val": 102, "test": 103}
MARKER = "dataset.json"
EVAL_README = """---
configs:
- config_name: default
  data_files:
  - split: validation
    path: val-*
  - split: test
    path: test-*
---

# Micro-lab questions

Procedural scenes, six questions each, written by `laavit/microlab/dataset.py`. The boxes are normalised corners.
"""
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
        train, val, test: scenes. kinds: question kinds; empty for the usual six. With one of several hops
            (``questions.HOP_KINDS``) the scenes are drawn for them, and every record says which box is of which hop.

    Raises:
        UserError: an empty split, or an unknown kind.
    """

    train: int = 1000
    val: int = 150
    test: int = 500
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.train, self.val, self.test) < 1:
            raise UserError(f"every split of the micro-lab has at least one scene, got {self}")
        known = [*QUESTION_KINDS, *HOP_KINDS]
        for kind in self.kinds:
            if kind not in known:
                raise UserError(f"kinds: no kind of question is called '{kind}'; {nearest(kind, known)}")


def visual_cot_record(identity: int, split: str, path: str, question: Question, hops: bool = False) -> dict[str, Any]:
    """One question as a four-turn Visual-CoT record; several boxes are several ``path###[...]`` entries.

    Args:
        hops: say which boxes belong to which hop, in a key that is no part of the format: lists of their places.
    """
    extra = {"hops": [[question.boxes.index(box) for box in hop] for hop in question.hops]} if hops else {}
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
        **extra,
    }


def write_dataset(root: str | Path, settings: DatasetSettings | None = None) -> Path:
    """Write the three splits; what a folder holds already is kept, so that a second call goes on or does nothing.

    Raises:
        UserError: the folder holds a data set of other settings, or of scenes that this version draws differently.
    """
    root, settings = Path(root), settings or DatasetSettings()
    kinds = list(settings.kinds) or list(QUESTION_KINDS)
    done, begun = root / MARKER, root / f".{MARKER}.begun"
    wanted = {"settings": json.loads(json.dumps(asdict(settings))), "kinds": kinds, "scenes": SCENES_VERSION}
    for marker in (done, begun):
        if marker.is_file():
            found = json.loads(marker.read_text(encoding="utf-8"))
            if {key: found.get(key) for key in wanted} != wanted:
                raise UserError(
                    f"'{root}' holds a micro-lab data set of other settings; name another folder or remove it"
                )
    if done.is_file():
        return root
    # It says whose pictures an interrupted call left behind.
    _write(begun, json.dumps(wanted).encode())
    hashes: dict[str, str] = {}
    for split, seed in SPLIT_SEEDS.items():
        scenes = getattr(settings, split)
        pairs = list(track(_split(root, split, seed, scenes, kinds), f"micro-lab {split}", scenes * len(kinds)))
        records = json.dumps([record for record, _ in pairs], indent=0).encode()
        hashes[f"{split}.json"] = _write(root / f"{split}.json", records)
        if split != "train":
            name = f"eval/{split}-00000-of-00001.parquet"
            hashes[name] = _write(root / name, _parquet([row for _, row in pairs]))
        logger.info("micro-lab %s: %d scenes, %d questions", split, scenes, len(pairs))
    _write(root / "eval/README.md", EVAL_README.encode())
    _write(done, json.dumps({**wanted, "sha256": hashes}, indent=2).encode())
    begun.unlink()
    return root


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    """The rows in the columns that ``datasets`` reads back with their types; an image's bytes are stored once."""
    buffer = io.BytesIO()
    table = Dataset.from_list(rows, features=COLUMNS).with_format("arrow")[:]
    pq.write_table(table, buffer, dictionary_pagesize_limit=1 << 30, row_group_size=len(rows))
    return buffer.getvalue()


def _split(root: Path, split: str, seed: int, scenes: int, kinds: list[str]) -> Iterator[tuple[dict, dict]]:
    """Every question of a split: its Visual-CoT record and its row for evaluation."""
    hops = has_hops(kinds)
    for index in range(scenes):
        scene = make_scene(seed, index, hops)
        path = f"{split}/{index:06d}.png"
        picture = _picture(root / "images" / path, scene)
        for number, question in enumerate(ask(scene, kinds)):
            identity = (seed * 100_000 + index) * 100 + number
            row = {
                "id": str(identity),
                "image": {"bytes": picture, "path": path},
                "question": question.text,
                "answer": question.answer,
                "kind": question.kind,
                "boxes": [[x / IMAGE_SIZE for x in box] for box in question.boxes],
            }
            yield visual_cot_record(identity, split, path, question, hops), row


def _picture(path: Path, scene: Scene) -> bytes:
    """The scene's PNG, drawn unless the file is there: files are put in place whole, so one that exists is complete."""
    if path.is_file():
        return path.read_bytes()
    buffer = io.BytesIO()
    # Noise hardly compresses: a higher level costs three times the time for a tenth of the size.
    Image.fromarray(render(scene)).save(buffer, "PNG", compress_level=1)
    _write(path, buffer.getvalue())
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> str:
    """Write atomically; returns the content's SHA-256."""
    write_bytes(path, content, sync=False)
    return hashlib.sha256(content).hexdigest()
