"""What the answer's loss costs: all logits at once, or those of some rows at a time (``train.loss_rows``).

    python tools/bench/loss.py --rows 256 64 --repeats 5 --out loss.json

Forward and backward of the library's own loss over the same labelled positions, from their states on, the head's
gradient included. *every position* is the stock way, for comparison: logits of all positions of the sequence, half of
which nobody asks anything. Ways that give another loss or gradient stop the script. Every way runs in a process of its
own; seconds are the processor's, medians of repeats that take turns, ratios are taken repeat by repeat.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import Worker, answer, asked, compared, peak_of, write_results

#: the stock way, and the base that the others are compared with: ``train.loss_rows=0``
STOCK, BASE = "every position", "all at once"


def make_step(way: str, options: argparse.Namespace) -> Callable[[], list[float]]:
    """The loss and the norms of both gradients, as a function."""
    import torch
    from torch.nn import functional as F

    from laavit.cross_entropy import next_token_loss, part_by_part

    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(options.width, options.vocabulary, bias=False)
    with torch.no_grad():
        head.weight.normal_(generator=generator).mul_(options.width**-0.5)
    states = torch.randn(2 * options.tokens, options.width, generator=generator)
    labels = torch.randint(options.vocabulary, (options.tokens,), generator=generator).to(options.device)
    head, states = head.to(options.device), states.to(options.device).requires_grad_()

    def loss() -> torch.Tensor:
        if way == STOCK:
            asked_of = F.pad(labels, (0, options.tokens), value=-100)
            return F.cross_entropy(head(states).float(), asked_of)
        own = states[: options.tokens]
        return next_token_loss(head(own), labels) if way == BASE else part_by_part(own, labels, head, int(way))

    def step() -> list[float]:
        head.weight.grad = states.grad = None
        found = loss()
        found.backward()
        grads = [grad for grad in (head.weight.grad, states.grad) if grad is not None]
        return [float(found.detach()), *(float(grad.norm()) for grad in grads)]

    return step


def worker(options: argparse.Namespace) -> None:
    """Answer every line of stdin with one measurement: ``memory`` or ``time``."""
    import torch

    torch.set_num_threads(options.threads)
    make_step(options.worker, argparse.Namespace(**{**vars(options), "tokens": 2, "vocabulary": 64}))()
    step = make_step(options.worker, options)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    for what in asked():
        if what == "memory":
            value, figures = peak_of(step, options.device)
        else:
            begin = clock()
            figures = step()  # its numbers are read on the host: a GPU is done
            value = clock() - begin
        answer([value, figures])


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a way: median seconds, peak bytes, both as ratios to all logits at once.

    Raises:
        RuntimeError: two ways give another loss or gradient.
    """

    def start(way: str, large_blocks: bool) -> Worker:
        command = [__file__, "--worker", way, "--device", options.device, "--threads", str(options.threads)]
        for name in ("tokens", "width", "vocabulary"):
            command += [f"--{name}", str(getattr(options, name))]
        return Worker(command, options.threads, large_blocks)

    found = compared([STOCK, BASE, *map(str, options.rows)], BASE, start, options.repeats)
    for way, row in found.items():
        pairs = zip(row["figure"], found[BASE]["figure"], strict=True)
        if not all(math.isclose(own, base, rel_tol=1e-4) for own, base in pairs):
            raise RuntimeError(f"{way} gives {row['figure']}, {BASE} {found[BASE]['figure']}: not the same work")
    return [{"way": way, **row} for way, row in found.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| logits in memory | step | peak memory | time | memory |", "|---|---|---|---|---|"]
    for row in rows:
        way = f"of {row['way']} rows" if row["way"].isdigit() else row["way"]
        lines.append(
            f"| {way} | {row['seconds'] * 1000:.0f} ms | {row['bytes'] / 2**20:.0f} MiB "
            f"| {row['time_ratio']:.2f} × | {row['memory_ratio']:.2f} × |"
        )
    return "\n".join(lines)


def main() -> int:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[256, 64], help="train.loss_rows, one way each")
    parser.add_argument("--tokens", type=int, default=1024, help="labelled positions")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--out", type=Path, help="write every measurement as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(*options.rows, options.tokens, options.width, options.vocabulary, options.repeats, options.threads) < 1:
        parser.error("--rows, --tokens, --width, --vocabulary, --repeats and --threads are at least 1")
    if options.worker:
        worker(options)
        return 0
    rows = compare(options)
    sys.stdout.write(table(rows) + "\n")
    if options.out is not None:
        names = ("device", "threads", "repeats", "tokens", "width", "vocabulary")
        write_results(options.out, {name: getattr(options, name) for name in names}, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
