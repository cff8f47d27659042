"""Traces that differ in everything that a store keeps, and a store of them."""

from pathlib import Path

import torch

from laavit.structures import Step, Tile, Trace
from laavit.traces.store import TraceStore, TraceWriter

COUNT, SHARD, HEADER = 150, 16, {"teacher": "tiny", "gaze_top_k": 4, "semantics_dtype": "float16"}


def trace(number: int, rows: int = 0) -> Trace:
    """A trace; one in three has two tiles, one in four steps, one in five a blind answer; ``rows`` > 0: not pooled."""
    generator = torch.Generator().manual_seed(number)
    tiles = (Tile(2, 3),) if number % 3 else (Tile(2, 3, 0, (0.0, 0.0, 1 / 3, 1.0)), Tile(4, 1, 1))
    cells = sum(tile.cells for tile in tiles)
    words = ("red", "Würfel", "") if number % 4 == 0 else ()
    steps = tuple(Step(word, "object" if word else "", torch.rand(cells, generator=generator)) for word in words)
    shape = (rows, 32) if rows else (32,)
    return Trace(
        sample_id=f"s{number}",
        answer=f"answer {number} ü",
        tiles=tiles,
        gaze=torch.rand(cells, generator=generator),
        semantics=torch.randn(shape, generator=generator),
        mass=number / COUNT,
        semantic_tokens=torch.randperm(cells, generator=generator)[:rows] if rows else None,
        steps=steps,
        blind_answer=None if number % 5 else f"guess {number}" if number % 10 else "",
    )


def write(folder: Path, count: int = COUNT) -> TraceStore:
    """A store of ``count`` samples, every 7th of them put aside."""
    with TraceWriter(folder, HEADER, shard_size=SHARD) as writer:
        for number in range(count):
            if number % 7 == 6:
                writer.quarantine(f"s{number}", f"no image {number}")
            else:
                writer.append(trace(number))
    return TraceStore(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that belongs to the store."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
