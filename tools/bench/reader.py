"""How long a reader takes to its first sample, and how much memory, on a generated Visual-CoT of the published size.

    python tools/bench/reader.py                          # 404,120 records in the published four-turn form, 215 MiB
    python tools/bench/reader.py --records 20000 --gzip

Three things are measured, each in a process of its own: ``json.load`` of the whole file (the floor of reading it at
once, without checking anything), the first opening (the index is written), and the second. Seconds are of the clock;
those of the processor beside them tell how busy the machine was. Memory is the process's highest resident size over
what it has after its imports.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: records of the published file, by source set (its 404,120 records shared out as in the paper's Table A3)
RECORDS = 404_120
SOURCES = {"flickr30k": 135_735, "gqa": 98_149, "openimages": 43_053, "docvqa": 33_453, "textcap": 32_152}
SOURCES |= {"v7w": 30_491, "textvqa": 18_524, "infographicsvqa": 15_055, "cub": 3_987, "vsr": 3_376}
REQUEST = " Please provide the bounding box coordinate of the region that can help you answer the question better."
WAYS = ("json.load", "first opening", "second opening")
#: what the first opening is held to: seconds, bytes
WANTED = {"first opening": (30.0, 300 * 2**20)}
WORDS = [
    "what",
    "where",
    "is",
    "the",
    "of",
    "a",
    "man",
    "woman",
    "child",
    "red",
    "blue",
    "small",
    "large",
    "sign",
    "number",
    "left",
    "right",
    "under",
    "behind",
    "holding",
]


def records(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records of the published form and length; ids count from 0 in each source set, so that they collide."""
    dice = random.Random(seed)
    left = {name: max(1, share * count // RECORDS) for name, share in SOURCES.items()}
    left["flickr30k"] += count - sum(left.values())
    for source, many in left.items():
        for number in range(many):
            width, height = dice.randint(300, 1600), dice.randint(300, 1600)
            x, y = sorted(dice.sample(range(width), 2)), sorted(dice.sample(range(height), 2))
            shares = [round(x[0] / width, 3), round(y[0] / height, 3), round(x[1] / width, 3), round(y[1] / height, 3)]
            path = f"cot/{source}/{dice.randrange(10**10):010d}.jpg"
            question = " ".join(dice.choices(WORDS, k=dice.randint(6, 24))).capitalize() + "?"
            yield {
                "dataset": source,
                "split": "train",
                "question_id": number,
                "image": [path, f"{path}###[{x[0]}, {y[0]}, {x[1]}, {y[1]}]"],
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question}{REQUEST}"},
                    {"from": "gpt", "value": f"[{', '.join(f'{share:.3f}' for share in shares)}]"},
                    {"from": "human", "value": "<image>"},
                    {"from": "gpt", "value": " ".join(dice.choices(WORDS, k=dice.randint(1, 12))).capitalize() + "."},
                ],
            }


def write(path: Path, count: int) -> None:
    """Write the records as one JSON list, gzipped where the name ends in .gz."""
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        for place, record in enumerate(records(count)):
            file.write(("[" if place == 0 else ", ") + json.dumps(record))
        file.write("]\n")


def high_water() -> int:
    """Highest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    import resource  # ru_maxrss is in bytes on macOS, in kilobytes elsewhere

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident() -> int:
    """What is resident now; the high-water mark starts again there, where the system allows it."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return high_water()


def worker(way: str, path: Path) -> dict[str, Any]:
    """One measurement: seconds to the first sample, bytes over the imports, and how many samples there are."""
    if way == "json.load":
        before, begin, busy = resident(), time.perf_counter(), time.process_time()
        opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            count = len(json.load(file))
    else:
        from laavit.data.visual_cot import VisualCoT

        before, begin, busy = resident(), time.perf_counter(), time.process_time()
        samples = VisualCoT(path, path.parent)
        samples.describe(0)  # all of the first sample but its image file, which is not generated
        count = len(samples)
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    return {"way": way, "seconds": seconds, "cpu": busy, "bytes": high_water() - before, "samples": count}


def measure(way: str, path: Path, cache: Path) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--worker", way, "--file", str(path)]
    environment = {**os.environ, "LAAVIT_CACHE": str(cache), "LAAVIT_LOG": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with what is wanted."""
    lines = [
        "| way | seconds to the first sample | of the processor | peak memory | samples | wanted |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        wanted = ""
        if row["way"] in WANTED:
            seconds, size = WANTED[row["way"]]
            met = row["seconds"] <= seconds and row["bytes"] <= size
            wanted = f"≤ {seconds:.0f} s, ≤ {size / 2**20:.0f} MiB: {'met' if met else 'missed'}"
        lines.append(
            f"| {row['way']} | {row['seconds']:.2f} | {row['cpu']:.2f} | {row['bytes'] / 2**20:.0f} MiB "
            f"| {row['samples']} | {wanted} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Generate, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--gzip", action="store_true", help="a gzipped file")
    parser.add_argument("--folder", type=Path, help="where the file and its index are kept; default: nowhere")
    parser.add_argument("--out", type=Path, help="write every measurement as JSON")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.records < len(SOURCES):
        parser.error(f"--records is at least {len(SOURCES)}")
    if options.worker:
        sys.stdout.write(json.dumps(worker(options.worker, options.file)) + "\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        kept = options.folder or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        path = kept / f"viscot_{options.records}.json{'.gz' if options.gzip else ''}"
        if not path.exists():
            write(path, options.records)
        rows = []
        with tempfile.TemporaryDirectory(dir=kept) as cache:
            for way in WAYS:
                rows.append(measure(way, path, Path(cache)))
                sys.stderr.write(json.dumps(rows[-1]) + "\n")
        size = path.stat().st_size
    sys.stdout.write(f"{options.records} records, {size / 2**20:.0f} MiB\n\n{table(rows)}\n")
    if options.out is not None:
        options.out.write_text(json.dumps({"records": options.records, "bytes": size, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
