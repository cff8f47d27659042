"""A writer to be killed: ``python writing.py FOLDER SEED``, run to the end, or forked and killed again and again.

The driver forks after its imports, so that an attempt costs milliseconds instead of seconds.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from laavit.structures import Tile, Trace
from laavit.traces.store import TraceWriter

COUNT, SHARD, HEADER = 150, 16, {"teacher": "tiny", "gaze_top_k": 4, "semantics_dtype": "float16"}


def trace(number: int) -> Trace:
    generator = torch.Generator().manual_seed(number)
    tiles = (Tile(2, 3),) if number % 3 else (Tile(2, 3), Tile(4, 1, 1))
    return Trace(
        sample_id=f"s{number}",
        answer=f"answer {number} ü",
        tiles=tiles,
        gaze=torch.rand(sum(tile.cells for tile in tiles), generator=generator),
        semantics=torch.randn(32, generator=generator),
        mass=number / COUNT,
    )


def write(folder: Path, pause: float = 0.0) -> None:
    with TraceWriter(folder, HEADER, shard_size=SHARD) as writer:
        for number in range(COUNT):
            if f"s{number}" not in writer.done:
                writer.append(trace(number))
                time.sleep(pause)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that belongs to the store."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def main() -> None:
    folder, rng, kills = Path(sys.argv[1]), random.Random(int(sys.argv[2])), 0
    torch.set_num_threads(1)
    while True:
        child = os.fork()
        if child == 0:
            write(folder, pause=0.001)
            os._exit(0)
        time.sleep(rng.uniform(0.002, 0.12))
        if os.waitpid(child, os.WNOHANG)[0] == 0:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status):
                kills += 1
                continue
        break
    sys.stdout.write(str(kills))


if __name__ == "__main__":
    main()
