"""Synthetic run folders in the published formats: a base student, Naive SFT, and LaViT with its latents on and off."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from laavit.evaluation.records import summarise, write_records

KINDS = ("colour", "shape", "relation", "depth")


def write_evaluation(run: Path, name: str, shares: dict[str, float], latents: str = "on", seed: int = 0) -> Path:
    """60 questions of each kind, of which the given shares are right; questions are equally hard for every model."""
    hardness = np.random.default_rng(1234).random((len(KINDS), 60))
    luck = np.random.default_rng(seed).normal(0, 0.15, hardness.shape)
    records = []
    for i, kind in enumerate(KINDS):
        order = np.argsort(hardness[i] + luck[i])
        right = set(order[: round(60 * shares[kind])].tolist())
        for j in range(60):
            records.append(
                {
                    "task": "microlab",
                    "id": f"{kind}-{j}",
                    "prediction": "a" if j in right else "b",
                    "target": "a",
                    "correct": j in right,
                    "kind": kind,
                }
            )
    folder = run / "eval" / name
    folder.mkdir(parents=True)
    write_records(folder / "records.jsonl", records)
    summary = {"model": str(run.name), "weights_sha256": "ab" * 32, "latents": latents, "tasks": summarise(records)}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_training(run: Path, recipe: dict, steps: int = 400) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.json").write_text(json.dumps(recipe))
    environment = {
        "command": ["tools/train.py", "model_zoo/microlab/cfg.py"],
        "python": "3.11.7",
        "packages": {"torch": "2.14.1", "transformers": "5.23.0"},
        "git": {"commit": "800a559", "dirty": False},
    }
    (run / "environment.json").write_text(json.dumps(environment))
    noise = np.random.default_rng(len(recipe["targets"]))
    lines = []
    for i in range(1, steps + 1, 2):
        entry = {"iter": i, "ntp": 0.8 + 1.4 * math.exp(-i / 90) + noise.normal(0, 0.07), "lr": 2e-3 * (1 - i / steps)}
        if recipe["targets"]:
            entry["concept"] = 0.25 + 0.7 * math.exp(-i / 60) + noise.normal(0, 0.02)
            entry["trajectory"] = 0.5 + 1.9 * math.exp(-i / 80) + noise.normal(0, 0.08)
            entry["gamma"] = 1e-6 + (1 - 1e-6) / 2 * (1 - math.cos(math.pi * min(i, 160) / 160))
        entry["loss"] = entry["ntp"] + 0.3 * (entry.get("concept", 0) + entry.get("trajectory", 0))
        lines.append(json.dumps(entry))
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")


def write_gaze(run: Path, count: int = 3) -> None:
    folder = run / "gaze"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    index = []
    for n in range(count):
        image = Image.fromarray(rng.integers(200, 235, (96, 96, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(image)
        spots = rng.permutation(9)[:5]
        for spot, colour in zip(spots, ["red", "blue", "green", "purple", "orange"], strict=True):
            x, y = 32 * (spot % 3), 32 * (spot // 3)
            draw.ellipse((x + 6, y + 6, x + 26, y + 26), fill=colour)
        image.save(folder / f"{n}.png")
        x, y = spots[0] % 3, spots[0] // 3
        focus = np.zeros((6, 6))
        focus[2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = 1
        maps = {}
        for name, sharp in (("teacher", 0.83), ("base", 0.2), ("student latents", 0.7)):
            noise = rng.random((6, 6))
            values = sharp * focus / 4 + (1 - sharp) * noise / noise.sum()
            maps[name] = {"grid": [6, 6], "values": values.flatten().tolist()}
        index.append(
            {
                "id": f"scene-{n}",
                "image": f"{n}.png",
                "question": "What colour is the circle in the marked cell?",
                "answer": "red",
                "boxes": [[x / 3, y / 3, (x + 1) / 3, (y + 1) / 3]],
                "maps": maps,
            }
        )
    (folder / "index.json").write_text(json.dumps(index))
    statistics = {
        "teacher": {"entropy": [1.9, 0.3], "salient": [5.1, 1.2], "cv": [2.2, 0.3], "in_box": [0.83, 0.81, 0.85]},
        "base": {
            "entropy": [3.3, 0.1],
            "salient": [9.0, 2.0],
            "cv": [0.7, 0.1],
            "in_box": [0.21, 0.19, 0.23],
            "n": 500,
        },
    }
    statistics["teacher"]["n"] = 500
    (folder / "statistics.json").write_text(json.dumps(statistics))


@pytest.fixture()
def make_runs(tmp_path: Path) -> Callable[[], list[Path]]:
    """Writes base, naive and lavit below a folder whose path is on no machine but this, and returns them in order."""

    def make() -> list[Path]:
        base, naive, lavit = (tmp_path / "runs" / name for name in ("base", "naive", "lavit"))
        write_evaluation(base, "test", dict.fromkeys(KINDS, 0.45), seed=1)
        common = {"seed": 3, "train": {"steps": 400, "lr": 2e-3}}
        write_training(naive, {**common, "student": {"name": "tiny"}, "latents": None, "targets": {}})
        targets = {"concept": {"name": "concept", "weight": 0.3}, "trajectory": {"name": "trajectory", "weight": 0.3}}
        write_training(
            lavit,
            {**common, "student": {"name": "tiny"}, "latents": {"name": "learned", "count": 4}, "targets": targets},
        )
        write_evaluation(naive, "test", {"colour": 0.4, "shape": 0.55, "relation": 0.8, "depth": 0.5}, seed=2)
        better = {"colour": 0.65, "shape": 0.75, "relation": 0.85, "depth": 0.6}
        write_evaluation(lavit, "test", better, seed=3)
        write_evaluation(lavit, "test-off", {**better, "colour": 0.6}, latents="off", seed=4)
        write_gaze(lavit)
        return [base, naive, lavit]

    return make
