"""A teacher that is quick and says who was in the batch, its samples with broken ones among them, and kills.

``python scripted.py FOLDER SEED WORKERS`` extracts by one process, 2 ranks at once, and 3 parts at once, again and
again in forked processes that are killed at random moments, until all of them end; it prints the kills of each.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from laavit.images import open_image
from laavit.registry import UserError
from laavit.structures import Sample, Step, Tile, Trace
from laavit.teachers import ExtractSettings, extract
from laavit.teachers.plan import Share

COUNT = 43
SETTINGS = ExtractSettings(batch_size=4, shard_size=10)
SIZES = ((8, 8), (12, 9), (8, 8), (5, 20))
GONE, BROKEN, MUTE = ("s5", "s42"), ("s11", "s12"), ("s30",)


class Samples(Sequence[Sample]):
    """Samples of images of several sizes: two files are gone, two are broken, one the teacher cannot read."""

    def __init__(self, root: Path, count: int = COUNT, mended: bool = False) -> None:
        self.root, self.mended = root, mended
        self.ids = tuple(f"s{number}" for number in range(count))
        for number, key in enumerate(self.ids):
            file = root / f"{key}.png"
            if not file.exists():
                Image.new("RGB", SIZES[number % len(SIZES)], (number, 0, 0)).save(file)
            if mended and file.read_bytes() == b"no image":
                Image.new("RGB", SIZES[number % len(SIZES)], (number, 0, 0)).save(file)
            elif key in BROKEN and not mended:
                file.write_bytes(b"no image")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        key = self.ids[index]
        if key in GONE and not self.mended:
            raise UserError(f"there is no image of '{key}'")
        question = "?" if key in MUTE and not self.mended else f"what is {key}?"
        return Sample(key, (self.root / f"{key}.png",), question, "red")

    def __iter__(self) -> Iterator[Sample]:
        return (self[place] for place in range(len(self)))


class Preparer:
    def __call__(self, sample: Sample) -> tuple[str, int]:
        if sample.question == "?":
            raise UserError("the question says nothing")
        return sample.id, open_image(sample.images[0]).getpixel((0, 0))[0]


class Extractor:
    """Traces that depend on the whole batch, as those of a model do in their last bits."""

    def __init__(self, pause: float = 0.0, spoil: Any = None) -> None:
        self.preparer, self.pause, self.spoil = Preparer(), pause, spoil
        self.seen: list[list[str]] = []

    def __call__(self, prepared: Sequence[tuple[str, int]]) -> list[Trace]:
        self.seen.append([key for key, _ in prepared])
        if self.spoil is not None:
            self.spoil(len(self.seen))
        time.sleep(self.pause)
        batch = ",".join(key for key, _ in prepared)
        return [self.trace(f"{batch}:{key}:{value}", key) for key, value in prepared]

    def trace(self, seed: str, key: str) -> Trace:
        generator = torch.Generator().manual_seed(int(hashlib.sha256(seed.encode()).hexdigest()[:12], 16))
        gaze = [torch.rand(6, generator=generator) for _ in range(2)]
        steps = (Step("red", "attribute", gaze[1]),)
        states = torch.randn(8, generator=generator)
        return Trace(key, f"red {seed}", (Tile(2, 3),), gaze[0], states, 0.5, steps=steps, blind_answer=None)


@dataclass
class Teacher:
    """Gives ``extractor`` whatever it is asked for, so that a test can look at it afterwards."""

    reader: Extractor
    path: str = "scripted"
    weights: str = "0"

    def card(self) -> dict[str, Any]:
        return {"teacher": self.path, "weights_sha256": self.weights, "width": 8}

    def extractor(self, settings: ExtractSettings) -> Extractor:
        return self.reader


def run(root: Path, out: Path, share: Share | None = None, pause: float = 0.0, **changes: Any) -> Path:
    """Extract the scripted samples."""
    settings = replace(SETTINGS, **changes)
    return extract(Teacher(Extractor(pause)), Samples(root), settings, out, {"name": "scripted"}, share)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store; locks and other hidden files do not count."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    named = {str(path.relative_to(folder)): path for path in files}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith(".")}


SHARES = {
    "one": [Share()],
    "ranks": [Share(rank=0, ranks=2), Share(rank=1, ranks=2)],
    "parts": [Share(0, 3), Share(1, 3), Share(2, 3)],
}


def start(root: Path, out: Path, share: Share, workers: int) -> int:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        run(root, out, share, pause=0.004, workers=workers)
        os._exit(0)
    return child


def killed(folder: Path, mode: str, dice: random.Random, workers: int, least: int = 3) -> int:
    """Kill a mode's processes at random moments until all of them end by themselves; returns the number of kills.

    The moments are drawn from what an undisturbed run takes on this machine just now; a store that was finished before
    ``least`` kills is begun again.
    """
    begin = time.monotonic()
    for child in [start(folder / "images", folder / f"{mode}-timed", share, workers) for share in SHARES[mode]]:
        os.waitpid(child, 0)
    seconds = time.monotonic() - begin
    kills, ended = 0, False
    while not ended:
        children = [start(folder / "images", folder / mode, share, workers) for share in SHARES[mode]]
        time.sleep(dice.uniform(0.1, 0.7) * seconds * (1 + kills / 10))
        for child in children if dice.random() < 0.7 else children[:1]:  # the whole machine, or one process of it
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.kill(child, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        kills += codes.count(-signal.SIGKILL)
        if any(code not in (0, -signal.SIGKILL) for code in codes):
            sys.exit(f"a process of '{mode}' ended with {codes}")
        ended = not any(codes)
        if ended and kills < least:
            shutil.rmtree(folder / mode)
            ended = False
    return kills


def main() -> None:
    folder, seed, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dice = random.Random(seed)
    sys.stdout.write(json.dumps({mode: killed(folder, mode, dice, workers) for mode in SHARES}))


if __name__ == "__main__":
    main()
