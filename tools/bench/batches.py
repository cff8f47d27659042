"""What padding costs, and how evenly work is spread: the decoder's tokens of each way to put samples into batches.

    python tools/bench/batches.py

Nothing is trained: the engine's own sampler is asked for its micro-batches, of samples with drawn lengths. Images have
256 to 1,280 tokens (200,704 to 1,003,520 pixels in Qwen2.5-VL; 690 on average), each with 1 to 6 questions (2.6 on
average) of some 50 tokens with their answers; steps are of 16 samples, 8 groups, or 16,384 tokens.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from laavit.engine.buckets import UnitLengths
from laavit.engine.sampler import BatchSampler

PARTS = (1, 4)
SHARED: dict[str, Any] = {"batch_size": 8, "shared": True}
#: way -> arguments of the sampler
WAYS: dict[str, dict[str, Any]] = {
    "padded": {},
    "bucketing=16": {"window": 16},
    "packing=pack": {"packed": True},
    "packing=pack, tokens=16384": {"packed": True, "tokens": 16_384},
    "grouped, shared_prefix": SHARED,
    "the same, bucketing=16": {**SHARED, "window": 16},
    "the same, packing=pack, tokens=16384": {**SHARED, "packed": True, "tokens": 16_384},
}


def drawn(images: int, seed: int) -> tuple[list[int], np.ndarray]:
    """The image of every sample, and lengths [n, 2]: up to the image's end, and after it."""
    random = np.random.default_rng(seed)
    tokens = np.clip(random.lognormal(np.log(640), 0.45, images), 256, 1280).astype(np.int64)
    asked = random.choice(6, images, p=[0.25, 0.3, 0.2, 0.12, 0.08, 0.05]) + 1
    owners = np.repeat(np.arange(images), asked)
    return owners.tolist(), np.stack([60 + tokens[owners], random.integers(34, 60, len(owners))], 1)


def measured(way: str, parts: int, steps: int, owners: list[int], lengths: np.ndarray) -> tuple[float, float]:
    """Tokens that the decoder reads over those that samples have; the heaviest micro-batch over a step's mean."""
    given = {"batch_size": 16, **WAYS[way]}
    groups = owners if given.get("shared") else None
    known = lengths if {"window", "tokens"} & given.keys() else None
    ranks = [
        BatchSampler(len(lengths), groups, steps=steps, seed=0, rank=r, world_size=parts, lengths=known, **given)
        for r in range(parts)
    ]
    units = ranks[0].units
    work = UnitLengths.of(lengths, units, bool(given.get("shared")), bool(given.get("packed")))
    unit_of = {index: number for number, unit in enumerate(units) for index in unit}
    read, held, heaviest = 0, 0, []
    for step in range(steps):
        batches = [sampler.micro_batch(step, 0) for sampler in ranks]
        loads = [work.work(sorted({unit_of[index] for index in batch})) for batch in batches]
        read += sum(loads)
        held += sum(int(lengths[batch].sum()) for batch in batches)
        heaviest.append(max(loads) * parts / sum(loads))
    return read / held, float(np.mean(heaviest))


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of each way")
    parser.add_argument("--images", type=int, default=4000, help="images of the data set")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.images < 100:
        parser.error("--steps is at least 1, --images at least 100")
    owners, lengths = drawn(options.images, 0)
    print("| | 1 micro-batch | 4 micro-batches | heaviest of 4 |\n|---|---|---|---|")
    for way in WAYS:
        one, four = (measured(way, parts, options.steps, owners, lengths) for parts in PARTS)
        print(f"| {way} | {one[0]:.2f} | {four[0]:.2f} | {four[1]:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
