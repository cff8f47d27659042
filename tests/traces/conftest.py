"""Random traces and stores of them, for the tests of the tools over stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from laavit.structures import Step, Tile, Trace
from laavit.traces.store import TraceStore, TraceWriter

HEADER = {"teacher": "tiny", "settings": {"rows": ["answer"], "blind": "teacher", "normalisation": "none"}}


def random_trace(number: int, rows: bool = False) -> Trace:
    """Trace ``s{number}``: one tile, or two images every third, steps, a blind answer."""
    generator = torch.Generator().manual_seed(number)
    tiles = (Tile(2, 3),) if number % 3 else (Tile(2, 3), Tile(4, 2, 1))
    count = sum(tile.cells for tile in tiles)
    tokens = torch.randperm(count, generator=generator)[:2] if rows else None
    return Trace(
        sample_id=f"s{number}",
        answer=f"answer {number} ü",
        tiles=tiles,
        gaze=torch.rand(count, generator=generator),
        semantics=torch.randn(*([2] if rows else []), 16, generator=generator),
        mass=number / 100,
        semantic_tokens=tokens,
        steps=tuple(Step(f"w{i}", "object", torch.rand(count, generator=generator)) for i in range(number % 4)),
        blind_answer=f"blind {number}",
    )


@pytest.fixture
def traces() -> Callable[..., Trace]:
    """``random_trace``."""
    return random_trace


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., TraceStore]:
    """``write(name, numbers, quarantined=[...], shard_size=4, **header)`` -> the store."""

    def writer(
        name: str, numbers: Sequence[int], quarantined: Sequence[int] = (), shard_size: int = 4, **header: Any
    ) -> TraceStore:
        with TraceWriter(tmp_path / name, {**HEADER, **header}, shard_size) as out:
            for number in numbers:
                if number in quarantined:
                    out.quarantine(f"s{number}", "broken image")
                else:
                    out.append(random_trace(number))
        return TraceStore(tmp_path / name)

    return writer


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file that belongs to a store: name -> bytes."""

    def read(folder: Path) -> dict[str, bytes]:
        files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    return read
