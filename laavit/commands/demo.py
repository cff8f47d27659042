"""``make demo``: the embedded experiment end to end, through the same commands that a real experiment takes.

Every line it runs is printed first and can be typed by hand. What is finished is not done again.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console

from laavit.commands.common import Parser
from laavit.paths import EXPORT_CARD, project_data
from laavit.registry import UserError

logger = logging.getLogger(__name__)

NOTE = (
    "The teacher's gaze was grounded: during its own training the attention of its last two layers was led to the "
    "ground-truth boxes. "
    "A tiny teacher trained on answers alone hardly looks where the answer is, and then alignment has little to give."
)
TASK = "microlab_test"


@dataclass(frozen=True)
class Job:
    """One command of the demo.

    Args:
        name: what its lines are marked with. words: the command. done: it is finished when all of these exist.
    """

    name: str
    words: tuple[str, ...]
    done: tuple[Path, ...] = field(default=())


def stages(root: Path) -> list[tuple[str, list[Job]]]:
    """The demo as stages; the jobs of one stage do not depend on each other."""
    recipes, data = project_data("model_zoo") / "microlab", root / "data"
    runs = {name: root / name for name in ("naive_sft", "lavit")}
    where = ("--data.annotations", str(data / "train.json"), "--data.root", str(data / "images"))
    kept = ("--traces.path", str(root / "traces"), "--traces.vision_cache", str(root / "vision"))

    def evaluate(name: str, model: str, latents: str = "on") -> Job:
        out = root / name / "eval" / f"{TASK}-latents-{latents}"
        words = ("eval", model, "--tasks", TASK, "--data-root", str(data / "eval"), "--batch-size", "64")
        return Job(f"{name} ({latents})", (*words, "--latents", latents, "--out", str(out)), (out / "summary.json",))

    trained = [
        Job(
            name,
            ("train", str(recipes / f"{name}.py"), *where, *kept, "--work-dir", str(run), "--resume"),
            (run / "export" / EXPORT_CARD,),
        )
        for name, run in runs.items()
    ]
    exported = [Job(name, ("export", str(run)), (run / "export" / EXPORT_CARD,)) for name, run in runs.items()]
    base = str(project_data("model_zoo") / "microlab" / "student")
    lookers = [
        f"teacher={project_data('model_zoo') / 'microlab' / 'teacher'}@header+answer@-2,-1",
        f"base={base}@header+answer@-2,-1",
        f"Naive SFT={runs['naive_sft'] / 'export'}@header+answer@-2,-1",
        f"LaViT latents={runs['lavit'] / 'export'}@latents@-2,-1",
    ]
    test = ("--annotations", str(data / "test.json"), "--root", str(data / "images"), "--limit", "600")
    gaze = Job(
        "gaze", ("gaze", str(runs["lavit"] / "gaze"), *lookers, *test), (runs["lavit"] / "gaze/statistics.json",)
    )
    order = [str(root / "base"), *(str(run) for run in runs.values())]
    described = (
        "--labels",
        "Base",
        "Naive SFT",
        "LaViT",
        "--notes",
        NOTE,
        "--title",
        "The micro-lab: does looking help?",
    )
    pages = [Job(out, ("report", *order, "--out", str(root / out), *described)) for out in ("report.html", "table.md")]
    return [
        ("scenes and questions", [Job("data", ("microlab", str(data)), (data / "dataset.json",))]),
        ("the teacher's gaze and semantics", [Job("extract", ("extract", str(recipes / "lavit.py"), *where, *kept))]),
        ("training", trained),
        ("export", exported),
        (
            "evaluation: before and Naive SFT",
            [evaluate("base", base), evaluate("naive_sft", str(runs["naive_sft"] / "export"))],
        ),
        ("evaluation: LaViT", [evaluate("lavit", str(runs["lavit"] / "export"), latents) for latents in ("on", "off")]),
        ("where they look", [gaze]),
        ("report", pages),
    ]


def run_stage(jobs: Sequence[Job], console: Console, logs: Path) -> None:
    """Run the jobs side by side, the cores shared out among them, their lines shown as they come.

    Raises:
        UserError: a job failed; its last lines are in the message.
    """
    todo = [job for job in jobs if not (job.done and all(path.exists() for path in job.done))]
    threads = max(1, (os.cpu_count() or 1) // max(1, len(todo)))
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
    }
    started = []
    for job in todo:
        console.print(f"  $ laavit {shlex.join(job.words)}", style="dim", highlight=False, markup=False, soft_wrap=True)
        command = [sys.executable, "-m", "laavit.cli", *job.words]
        process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None, "a pipe was asked for"
        tail: list[str] = []
        log = open(logs / f"{job.name.replace(' ', '_')}.log", "w", encoding="utf-8")  # noqa: SIM115 - closed by the thread
        thread = threading.Thread(target=_relay, args=(job.name, process.stdout, log, tail, console), daemon=True)
        thread.start()
        started.append((job, process, thread, tail))
    for job, process, thread, tail in started:
        code = process.wait()
        thread.join()
        if code:
            for _, other, _, _ in started:
                other.terminate()
            raise UserError(f"'laavit {job.words[0]}' of '{job.name}' ended with {code}: " + " | ".join(tail[-5:]))


def _relay(name: str, source: IO[str], log: IO[str], tail: list[str], console: Console) -> None:
    with log:
        for line in source:
            log.write(line)
            text = line.rstrip().rpartition("\r")[2]
            if text:
                tail.append(text)
                console.print(f"  [{name}] {text}", highlight=False, markup=False, soft_wrap=True)


def result(root: Path) -> str:
    """One line per row of the table, read from the summaries."""
    lines = []
    for name, label, latents in (
        ("base", "Base", "on"),
        ("naive_sft", "Naive SFT", "on"),
        ("lavit", "LaViT", "on"),
        ("lavit", "LaViT, latents masked", "off"),
    ):
        file = root / name / "eval" / f"{TASK}-latents-{latents}" / "summary.json"
        task = json.loads(file.read_text(encoding="utf-8"))["tasks"][TASK]
        lines.append(f"  {label:22} {task['accuracy']:.3f}  [{task['low']:.3f}, {task['high']:.3f}]  n = {task['n']}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = Parser(prog="demo", description="The embedded experiment, end to end.")
    parser.add_argument("--root", type=Path, default=Path("runs/demo"), help="where everything goes")
    options = parser.parse_args(list(argv))
    root: Path = options.root
    logs = root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    console, started = Console(), time.monotonic()
    every = stages(root)
    for number, (title, jobs) in enumerate(every, 1):
        console.print(
            f"\n{number}/{len(every)} {title}  ({time.monotonic() - started:.0f} s)", style="bold", highlight=False
        )
        run_stage(jobs, console, logs)
    console.print(f"\naccuracy on {TASK}, 95 % intervals:\n{result(root)}\n", highlight=False)
    console.print(
        f"page: {root / 'report.html'}\ntable: {root / 'table.md'}\nstudent: {root / 'lavit' / 'export'}",
        highlight=False,
    )
    console.print(f"{time.monotonic() - started:.0f} s in all", highlight=False)
    return 0
