"""Small copies of the benchmarks in their published schemas: columns, types, configs, splits, file names, cards.

The questions are made up; their form is the published one: MMVP's inline options "(a) … (b) …", V*'s text that holds
its instruction, MMStar's "Options: A: …, B: …" (and one question in another form), BLINK's one to four images.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures

TEXT, WHOLE = Value("string"), Value("int64")
ROWS = 8

#: BLINK's configs: images a question, and the options
BLINK: dict[str, tuple[int, Sequence[str]]] = {
    "Art_Style": (3, ["the second image", "the third image"]),
    "Counting": (1, ["0", "3", "2", "1"]),
    "Forensic_Detection": (4, ["the first image", "the second image", "the third image", "the fourth image"]),
    "Functional_Correspondence": (2, ["Point A", "Point B", "Point C", "Point D"]),
    "IQ_Test": (1, ["picture A", "picture B", "picture C", "picture D"]),
    "Jigsaw": (3, ["the second image", "the third image"]),
    "Multi-view_Reasoning": (2, ["left", "right"]),
    "Object_Localization": (1, ["Box A", "Box B"]),
    "Relative_Depth": (1, ["A is closer", "B is closer"]),
    "Relative_Reflectance": (1, ["A is darker", "B is darker", "About the same"]),
    "Semantic_Correspondence": (2, ["Point A", "Point B", "Point C", "Point D"]),
    "Spatial_Relation": (1, ["yes", "no"]),
    "Visual_Correspondence": (2, ["Point A", "Point B", "Point C", "Point D"]),
    "Visual_Similarity": (3, ["the second image", "the third image"]),
}


def image(seed: int, size: tuple[int, int] = (32, 32)) -> dict[str, Any]:
    """A picture of noise as the `datasets` library stores one."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    stream = io.BytesIO()
    Pictures.fromarray(pixels.to(torch.uint8).numpy()).save(stream, format="PNG")
    return {"bytes": stream.getvalue(), "path": None}


def _write(folder: Path, files: dict[str, tuple[list[dict[str, Any]], Features]], configs: dict[str, Any]) -> None:
    """Parquet files and a card; ``configs``: name -> {split: path}."""
    for name, (rows, features) in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(folder / name)
    card = {
        "configs": [
            {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in splits.items()]}
            for name, splits in configs.items()
        ]
    }
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n\n# a small copy\n")


def _prompt(question: str, options: Sequence[str]) -> str:
    listed = "\n".join(f"({chr(65 + place)}) {option}" for place, option in enumerate(options))
    return f"{question}\nSelect from the following choices.\n{listed}"


def mmvp(root: Path, rows: int = ROWS) -> None:
    """``rows`` questions around the first of the two relabelled pairs (99 - 100)."""
    features = Features({"image": Image(), "Index": WHOLE, "Question": TEXT, "Options": TEXT, "Correct Answer": TEXT})
    questions = [
        {
            "image": image(i),
            "Index": 97 + i,
            "Question": "Is the circle left of the square?",
            "Options": ("(a) Yes (b) No", "(a) red (b) dark blue")[i // 2 % 2],
            "Correct Answer": ("(a)", "(b)")[(i + i // 2) % 2],
        }
        for i in range(rows)
    ]
    files = {"data/train-00000-of-00001.parquet": (questions, features)}
    _write(root / "lmms-lab-eval/MMVP", files, {"default": {"train": "data/train-*"}})


def vstar(root: Path) -> None:
    features = Features({"image": Image(), **dict.fromkeys(("text", "category", "label", "question_id"), TEXT)})
    options = (["rubber", "cotton", "kevlar", "leather"], ["left", "right"])
    kinds = ("direct_attributes", "relative_position")
    rows = [
        {
            "image": image(100 + i, (96, 64)),
            "text": "What is the material of the glove?\n"
            + "\n".join(f"({'ABCD'[j]}) {text}" for j, text in enumerate(options[i % 2]))
            + "\nAnswer with the option's letter from the given choices directly.",
            "category": kinds[i % 2],
            "label": "AB"[i // 2 % 2],
            "question_id": str(i // 2),
        }
        for i in range(2 * ROWS)
    ]
    files = {"data/test-00000-of-00001.parquet": (rows, features)}
    _write(root / "lmms-lab-encoder/vstar-bench", files, {"default": {"test": "data/test-*"}})


def blink(root: Path, only: Sequence[str] = tuple(BLINK)) -> None:
    pictures = {f"image_{i}": Image() for i in range(1, 5)}
    texts = dict.fromkeys(("idx", "question", "sub_task", "explanation"), TEXT)
    features = Features({**texts, **pictures, "choices": List(TEXT), "answer": TEXT, "prompt": TEXT})
    files, configs = {}, {}
    for name, (shown, options) in BLINK.items():
        for split in ("val", "test"):
            rows = [
                {
                    "idx": f"{split}_{name}_{i + 1}",
                    "question": "Which one is it?",
                    "sub_task": name,
                    "explanation": "",
                    **{f"image_{j}": image(200 + 10 * i + j) if j <= shown else None for j in range(1, 5)},
                    "choices": list(options),
                    "answer": "hidden" if split == "test" else f"({'AB'[i % 2]})",
                    "prompt": _prompt("Which one is it?", options),
                }
                for i in range(ROWS)
            ]
            if name in only:
                files[f"{name}/{split}-00000-of-00001.parquet"] = (rows, features)
        configs[name] = {split: f"{name}/{split}-*" for split in ("val", "test")}
    _write(root / "BLINK-Benchmark/BLINK", files, configs)


#: the first two of MMStar's axes of three of its capabilities
AXES = {
    "coarse perception": ("image scene and topic", "image style & quality"),
    "instance reasoning": ("single-instance reasoning", "cross-instance attribute reasoning"),
    "math": ("geometry", "numeric commonsense and calculation"),
}


def mmstar(root: Path) -> None:
    meta = {"source": TEXT, "split": TEXT, "image_path": TEXT}
    texts = dict.fromkeys(("answer", "category", "l2_category"), TEXT)
    features = Features({"index": WHOLE, "question": TEXT, "image": Image(), **texts, "meta_info": meta})
    listed = "What is the colour?\nOptions: A: dark, very blue, B: red, C: green, D: yellow"
    other = "Hint: Please answer with the option letter.\nQuestion: How many?\nChoices:\n(A) 1\n(B) 2\n(C) 3\n(D) 4"
    rows = []
    for capability, axes in AXES.items():
        for place in range(4):  # axes of unequal size, so that the macro over them is another figure than the micro
            i = len(rows)
            rows.append(
                {
                    "index": i,
                    "question": other if i == 3 else listed,
                    "image": image(300 + i),
                    "answer": "AB"[i // 2 % 2],
                    "category": capability,
                    "l2_category": axes[place == 3],
                    "meta_info": {"source": "MMBench", "split": "val", "image_path": f"images/{i}.jpg"},
                }
            )
    _write(root / "Lin-Chen/MMStar", {"mmstar.parquet": (rows, features)}, {"val": {"val": "mmstar.parquet"}})


def hallusion(root: Path) -> None:
    names = ("category", "subcategory", "visual_input", "set_id", "figure_id", "sample_note", "question_id", "question")
    names += ("gt_answer_details", "gt_answer", "filename")
    features = Features({**dict.fromkeys(names, TEXT), "image": Image()})
    rows = [
        {
            "category": ("VD", "VS")[i % 2],
            "subcategory": ("illusion", "chart")[i % 2],
            "visual_input": "1",
            "set_id": "0",
            "figure_id": str(i // 2 % 2),
            "sample_note": "circle",
            "question_id": str(i // 4),
            "question": "Is the left circle as large as the right one?",
            "gt_answer_details": "They are of one size.",
            "gt_answer": "10"[i // 3 % 2],
            "filename": f"./hallusion_bench/{i}.png",
            "image": image(400 + i),
        }
        for i in range(12)
    ]
    blind = [row | {"image": None, "visual_input": "0", "filename": None} for row in rows[:2]]
    files = {
        f"data/{split}-00000-of-00001.parquet": (of, features) for split, of in (("image", rows), ("non_image", blind))
    }
    _write(
        root / "lmms-lab-encoder/HallusionBench",
        files,
        {"default": {"image": "data/image-*", "non_image": "data/non_image-*"}},
    )


def pope(root: Path) -> None:
    names = ("id", "question_id", "question", "answer", "image_source")
    features = Features({**dict.fromkeys(names, TEXT), "image": Image(), "category": TEXT})
    parts = ("adversarial", "popular", "random")
    rows = [
        {
            "id": str(i),
            "question_id": str(i % ROWS + 1),
            "question": "Is there a snowboard in the image?",
            "answer": ("yes", "no")[i % 2],
            "image_source": f"COCO_val2014_{i:012d}",
            "image": image(500 + i),
            "category": parts[i // ROWS],
        }
        for i in range(3 * ROWS)
    ]
    shards = (rows[:10], rows[10:20], rows[20:])
    files = {f"data/test-{i:05d}-of-00003.parquet": (part, features) for i, part in enumerate(shards)}
    for place, part in enumerate(parts):
        own = rows[place * ROWS : (place + 1) * ROWS]
        files[f"Full/{part}-00000-of-00001.parquet"] = (own, features)
    configs = {"Full": {part: f"Full/{part}-*" for part in parts}, "default": {"test": "data/test-*"}}
    _write(root / "lmms-lab-encoder/POPE", files, configs)


def cv_bench(root: Path) -> None:
    names = ("type", "task", "question", "answer", "prompt", "filename", "source", "source_dataset", "source_filename")
    columns = {"idx": WHOLE, **dict.fromkeys(names, TEXT), "image": Image(), "choices": List(TEXT)}
    features = Features({**columns, "target_class": TEXT, "target_size": WHOLE, "bbox": List(List(Value("float64")))})
    options = {"Count": ["0", "3", "1", "2", "4"], "Relation": ["left", "right"], "Depth": ["keyboard", "desk"]}
    options["Distance"] = ["car (highlighted by a blue box)", "bus (highlighted by a green box)"]
    made = [
        ("2D", "Count", "ADE20K"),
        ("2D", "Relation", "COCO"),
        ("3D", "Depth", "Omni3D"),
        ("3D", "Distance", "Omni3D"),
    ]
    rows = [
        {
            "idx": i,
            "type": kind,
            "task": task,
            "question": "Which one?",
            "answer": f"({'AB'[i // 2 % 2]})",
            "prompt": _prompt("Which one?", options[task]).replace("choices.", f"choices. {task}"),
            "filename": f"img/{kind}/{i}.png",
            "source": source,
            "source_dataset": source,
            "source_filename": f"{i}.jpg",
            "image": image(600 + i),
            "choices": options[task],
            "target_class": None,
            "target_size": None,
            "bbox": [[0.0, 1.0, 2.0, 3.0]],
        }
        for i, (kind, task, source) in enumerate(made[j] for j in (0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3))
    ]
    files = {
        f"test_{part}.parquet": ([r for r in rows if r["type"].lower() == part], features) for part in ("2d", "3d")
    }
    configs = {
        "default": {"test": "test*.parquet"},
        "2D": {"test": "test_2d.parquet"},
        "3D": {"test": "test_3d.parquet"},
    }
    _write(root / "nyu-visionx/CV-Bench", files, configs)


def write_all(root: Path) -> Path:
    """Every benchmark under ``root/<owner>/<name>``, as ``laavit data fetch`` lays them out."""
    for write in (mmvp, vstar, blink, mmstar, hallusion, pope, cv_bench):
        write(root)
    return root
