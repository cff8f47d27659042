"""What the benchmarks share: a worker process that measures when asked, peak memory, and the file of results."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


def high_water() -> int:
    """Highest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    import resource  # ru_maxrss is in bytes on macOS, in kilobytes elsewhere

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of(run: Callable[[], Any], device: str) -> tuple[int, Any]:
    """Peak memory of one run over what is in use before it, in bytes, and what the run returned."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        figure = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, figure
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # the high-water mark starts again at what is resident now
    before = high_water()
    figure = run()
    return high_water() - before, figure


class Worker:
    """A process that answers a line of words with a line of JSON.

    Args:
        command: the script and its words. threads: of its own.
        large_blocks: freed tensors go back to the system at once, so that a peak is of tensors in use.
    """

    def __init__(self, command: Sequence[str], threads: int, large_blocks: bool = False) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if large_blocks:
            environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, what: str) -> Any:
        """What the worker answers.

        Raises:
            RuntimeError: it has stopped.
        """
        assert self.process.stdin is not None and self.process.stdout is not None, "both are pipes"
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker stopped with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Let the worker end."""
        assert self.process.stdin is not None, "it is a pipe"
        self.process.stdin.close()
        self.process.wait()


def compared(
    ways: Sequence[str], base: str, start: Callable[[str, bool], Worker], repeats: int
) -> dict[str, dict[str, Any]]:
    """Ways of doing the same work: median seconds and peak bytes, both as ratios to the base's.

    Args:
        start: a worker of a way, with large blocks or not; asked for "memory" it answers peak and figure, for "time"
            the seconds first.

    Returns: way -> ``bytes``, ``figure``, ``times``, ``seconds``, ``time_ratio``, ``memory_ratio``.
    """
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        alone = start(way, True)
        peak, figure = alone.ask("memory")
        alone.close()
        found[way] = {"bytes": int(peak), "figure": figure, "times": []}
    workers = {way: start(way, False) for way in ways}
    for way in ways:
        workers[way].ask("time")  # the first pass also pays for the allocator's growth
    for _ in range(repeats):
        for way in ways:
            found[way]["times"].append(workers[way].ask("time")[0])
    for one in workers.values():
        one.close()
    for row in found.values():
        row["seconds"] = statistics.median(row["times"])
        # Repeat by repeat: what slows the machine down for a while slows neighbours alike.
        pairs = zip(row["times"], found[base]["times"], strict=True)
        row["time_ratio"] = statistics.median(own / plain for own, plain in pairs)
        row["memory_ratio"] = row["bytes"] / max(found[base]["bytes"], 1)
    return found


def asked() -> Iterator[str]:
    """The lines that a worker is asked, in the worker."""
    for line in sys.stdin:
        yield line.strip()


def answer(value: Any) -> None:
    """One answer, in the worker."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def write_results(path: Path, about: dict[str, Any], rows: Any) -> None:
    """Every measurement as JSON, with what it was taken on."""
    import torch
    import transformers

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    about = {"torch": torch.__version__, "transformers": transformers.__version__, **about, "load": load}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
