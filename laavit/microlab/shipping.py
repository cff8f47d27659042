"""A trained tiny model as a Hugging Face folder with its card, figures and hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from laavit.microlab.questions import HOP_KINDS
from laavit.microlab.scenes import COLOURS, COUNTS, FORMS, IMAGE_SIZE

HASHES = "hashes.json"
CARD = "card.md"
#: kind -> how many answers it has, all about equally frequent
OPTIONS = {
    "colour": len(COLOURS),
    "shape": len(FORMS),
    "relation": 2,
    "depth": 2,
    "reflectance": 2,
    "count": len(COUNTS),
    **{kind: len(COLOURS) if kind.endswith("colour") else len(FORMS) for kind in HOP_KINDS},
}


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ship(folder: Path, model: Any, processor: Any, recipe: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write weights, processor, ``card.md``, ``training.json`` (recipe and figures) and ``hashes.json``.

    The folder is made beside its place and then put there, replacing what stood there.
    """
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    staged.mkdir(parents=True)
    # stock implementations: the folder must load where laavit is not installed
    model.set_attn_implementation("sdpa")
    model.save_pretrained(staged)
    processor.save_pretrained(staged)
    report = {"recipe": recipe, "figures": figures}
    (staged / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (staged / CARD).write_text(card(recipe, figures), encoding="utf-8")
    hashes = {path.name: sha256(path) for path in sorted(staged.iterdir())}
    (staged / HASHES).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(staged, folder)


def verify(folder: Path) -> list[str]:
    """The names of files that are missing or differ from ``hashes.json``."""
    hashes = json.loads((folder / HASHES).read_text(encoding="utf-8"))
    return [name for name, digest in hashes.items() if not (folder / name).is_file() or sha256(folder / name) != digest]


def card(recipe: dict[str, Any], figures: dict[str, Any]) -> str:
    """The model card: what it is, how it was trained, what was measured, what not to conclude."""
    answers, vision, found = recipe["answers"], recipe["vision"], figures["validation"]
    kinds = "\n".join(
        f"| {kind} | {value:.3f} | {f'{1 / OPTIONS[kind]:.3f}' if kind in OPTIONS else ''} |"
        for kind, value in found["accuracy"].items()
    )
    masses = "\n".join(
        f"| {rows} | {' | '.join(f'{value:.2f}' for value in values)} |" for rows, values in found["in_box"].items()
    )
    layers = range(len(found["in_box"]["answer"]))
    return f"""# Micro-lab {recipe["name"]}

A real `Qwen2_5_VLForConditionalGeneration` of {figures["parameters"]:,} parameters (float32, random start) for
procedural {IMAGE_SIZE} x {IMAGE_SIZE} scenes, with its own tokenizer and processor. Of no use for real images.
Apache-2.0.

Made by `python -m laavit.microlab.pretrain model_zoo/microlab/{recipe["name"]}.py --out DIR` with seed
{recipe["seed"]}, in {figures["seconds"]} s on {figures["threads"]} CPU thread(s) of a busy machine:

1. {_tower(vision)}
2. {answers["steps"]} steps of {answers["batch_size"]} scenes with one question of each kind, out of {answers["scenes"]}
   scenes that no split contains.

{_gaze(answers)}

Accuracy on {recipe["validation"]} scenes of the validation split, mean {found["mean"]:.3f}:

| kind | accuracy | by guessing |
|---|---|---|
{kinds}

Share of the attention to image tokens that falls inside the boxes, by rows and layer:

| rows | {" | ".join(f"layer {layer}" for layer in layers)} |
|---|{"---|" * len(layers)}
{masses}

`training.json` holds the recipe and every figure, `hashes.json` the SHA-256 of each file.
"""


def _gaze(answers: dict[str, Any]) -> str:
    """What the card says about where the gaze comes from."""
    if not answers["grounding"]:
        return "It was trained on answers alone: nothing taught it where to look."
    layers = ", ".join(map(str, answers["layers"]))
    return f"""**Its gaze was grounded with boxes**: beside the answers it was trained with {answers["grounding"]:g} x
KL(boxes || attention over the image tokens) on the rows of the assistant's header and the answer, averaged over the
layers {layers}. That it looks at the right place is put in, not found; what the experiment shows is what a student
gains from such a gaze."""


def _tower(vision: dict[str, Any]) -> str:
    """What the card says about where the vision tower comes from."""
    if "path" in vision:
        return f"the vision tower of `{vision['path']}` as it is, frozen;"
    return f"""a warm start of the vision tower with a label for every image token ({vision["steps"]} steps of
   {vision["batch_size"]} scenes); the tower is frozen afterwards;"""
