"""What an evaluation's answers cost: the bridge against one question at a time, on the same samples, in one run.

    python tools/bench/evaluation.py --out evaluation.json

*Bridge* is the lmms-eval model ``laavit`` as a task asks it: questions sorted by the length of their prompts, answered
in batches, each image through the vision tower once. *One by one* is what a model card shows: the stock processor's
chat template and ``generate``, one question after another. Both decode the same stored images, and both must give the
same answers, or the comparison stops.

The model is the micro-lab's architecture with random weights, so that every answer is as long as it may be. Both ways
are processes of their own, times are medians of repeats that take turns, factors are taken repeat by repeat, memory is
the peak over the loaded model. On a CPU the time is the processor's, which other processes disturb least.

(The file is not called ``evaluate``: lmms-eval imports a package of that name, and a script's own folder comes first.)
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from extract import mixed_grids, write_samples, write_teacher
from measuring import Worker, answer, asked, compared, peak_of, write_results

WAYS = ("bridge", "one by one")
#: times as many answers a second as one by one
WANTED = 3.0
QUICK = dict(samples=6, tokens=[4, 24], answer=3, width=32, layers=2, repeats=1, questions=[2])
TASK, SPLIT = "bench", "test"


# --- one way, in a process of its own --------------------------------------------------------------------------------


def documents(folder: Path, samples: int, questions: int) -> Any:
    """As a benchmark stores them: so many rows of a question and an encoded image, so many rows an image."""
    from datasets import Dataset, Features, Image, Value

    records = json.loads((folder / "mixed.json").read_text(encoding="utf-8"))
    rows = [
        {
            "question": records[i][2],
            "image": {"bytes": (folder / records[i // questions][1]).read_bytes(), "path": None},
        }
        for i in range(samples)
    ]
    return Dataset.from_list(rows, features=Features({"question": Value("string"), "image": Image()}))


def content(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """One user turn, the image under the name that the reader wants."""
    shown = [{"type": "image", key: row["image"].convert("RGB")}, {"type": "text", "text": row["question"]}]
    return [{"role": "user", "content": shown}]


def bridge(rows: Any, options: argparse.Namespace) -> Callable[[], list[str]]:
    """All questions at once, as lmms-eval hands them over."""
    from lmms_eval.api.instance import Instance

    from laavit.evaluation.bridge import Laavit

    model = Laavit(str(options.folder / "teacher"), batch_size=options.batch, device=options.device)
    model.task_dict = {TASK: {SPLIT: rows}}
    settings = {"max_new_tokens": options.answer}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=(row["question"], partial(content, key="url"), settings, i, TASK, SPLIT),
            idx=0,
            metadata={"task": TASK, "doc_id": i, "repeats": 1},
        )
        for i, row in enumerate(rows.select_columns(["question"]))
    ]

    def run() -> list[str]:
        model.clean()  # no image is known from the repeat before
        model.images.clear()
        return [found.text for found in model.generate_until(requests)]

    return run


def one_by_one(rows: Any, options: argparse.Namespace) -> Callable[[], list[str]]:
    """The stock processor and ``generate``."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = options.folder / "teacher"
    model = AutoModelForImageTextToText.from_pretrained(folder).to(options.device).eval()
    processor = AutoProcessor.from_pretrained(folder)

    def run() -> list[str]:
        found = []
        for row in rows:
            inputs = processor.apply_chat_template(
                content(row, "image"), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(options.device)
            with torch.inference_mode():
                output = model.generate(**inputs, max_new_tokens=options.answer, do_sample=False)
            written = output[0, inputs["input_ids"].shape[1] :]
            found.append(processor.decode(written, skip_special_tokens=True).lstrip())
        return found

    return run


def worker(options: argparse.Namespace) -> None:
    """Answer every line of stdin with one measurement, ``memory`` or ``time``, and the answers."""
    import torch

    torch.set_num_threads(options.threads)
    way, questions = options.worker[0], int(options.worker[1])
    make = bridge if way == WAYS[0] else one_by_one
    make(documents(options.folder, 2, 1), options)()  # libraries and kernels are loaded before anything is measured
    run = make(documents(options.folder, options.samples, questions), options)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    for what in asked():
        if what == "memory":
            value, found = peak_of(run, options.device)
        else:
            begin = clock()
            found = run()
            value = clock() - begin
        answer([value, found])


# --- the comparison --------------------------------------------------------------------------------------------------


def start(way: str, questions: int, options: argparse.Namespace, large_blocks: bool) -> Worker:
    """A worker of one way."""
    command = [__file__, "--worker", way, str(questions), "--folder", str(options.folder), "--device", options.device]
    for name in ("samples", "answer", "batch", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    return Worker(command, options.threads, large_blocks)


def compare(questions: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a way.

    Raises:
        RuntimeError: the two ways answered differently.
    """
    found = compared(
        WAYS, WAYS[1], lambda way, large: start(way, questions, options, large_blocks=large), options.repeats
    )
    ours, plain = (found[way].pop("figure") for way in WAYS)
    for number, (one, other) in enumerate(zip(ours, plain, strict=True)):
        if one != other:
            raise RuntimeError(f"question {number}: '{one}' and '{other}'")
    return [
        {"questions": questions, "way": way, "answers": options.samples / row["seconds"], **row}
        for way, row in found.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| questions an image | way | answers a second | times one by one | peak memory | wanted |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        factor = 1 / row["time_ratio"]
        wanted = f"≥ {WANTED:.0f}: {'met' if factor >= WANTED else 'missed'}" if row["way"] == WAYS[0] else ""
        lines.append(
            f"| {row['questions']} | {row['way']} | {row['answers']:.1f} | {factor:.1f} "
            f"| {row['bytes'] / 2**20:.0f} MiB | {wanted} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200, help="questions")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 4], help="about the same image")
    parser.add_argument("--tokens", type=int, nargs=2, default=[16, 256], help="least and most tokens of an image")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer; MMVP's and V*'s limit")
    parser.add_argument("--width", type=int, default=128, help="of the decoder")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="write every measurement as JSON")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    numbers = (options.samples, *options.questions, *options.tokens, options.answer, options.batch, options.repeats)
    if min(numbers) < 1 or options.tokens[0] > options.tokens[1]:
        parser.error("every number is at least 1, and the least number of tokens no more than the most")
    if options.worker:
        worker(options)
        return 0
    options.folder = Path(tempfile.mkdtemp(prefix="laavit-bench-"))
    rows: list[dict[str, Any]] = []
    try:
        model = {"tokens": options.tokens, "large": options.tokens[1], "width": options.width, "layers": options.layers}
        write_teacher(options.folder / "teacher", SimpleNamespace(**model))
        write_samples(options.folder, "mixed", mixed_grids(max(options.samples, 2), *options.tokens))
        for questions in options.questions:
            rows += compare(questions, options)
            sys.stderr.write(table(rows).split("\n", 2)[2] + "\n\n")  # each case as it is done
    finally:
        shutil.rmtree(options.folder)
    sys.stdout.write(table(rows) + "\n")
    if options.out is not None:
        names = ("samples", "tokens", "answer", "width", "layers", "batch", "repeats", "threads", "device")
        write_results(options.out, {name: getattr(options, name) for name in names}, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
