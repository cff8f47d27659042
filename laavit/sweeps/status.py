"""What happened to the cells: ``status.jsonl``, ``failures.md``, and what a person sees meanwhile."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from laavit.engine.hooks.progress import span
from laavit.files import write_text
from laavit.sweeps.cell import tail
from laavit.sweeps.plan import Cell, Plan

logger = logging.getLogger(__name__)

FILE, FAILURES = "status.jsonl", "failures.md"


class Status:
    """Keeps count of a sweep's cells while they run: a line of ``status.jsonl`` an event, and a bar on a terminal.

    Args:
        todo: the cells of this call. workers: how many run at a time, for the time that is left.
    """

    def __init__(self, plan: Plan, todo: Iterable[Cell], workers: int = 1, console: Console | None = None) -> None:
        self.plan, self.total, self.workers = plan, len(list(todo)), workers
        self.console = console or Console(stderr=True)
        self.running: dict[str, str] = {}
        self.done: list[str] = []
        self.failed: dict[str, str] = {}
        self.seconds = 0.0
        columns = (TextColumn("cells"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[now]}"), console=self.console, refresh_per_second=2)
        self.task = self.bar.add_task("cells", total=self.total, now="")

    def __enter__(self) -> Status:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def tell(self, event: Mapping[str, Any]) -> None:
        """One event of a cell: 'started', 'stage', 'done', 'failed' or 'died'."""
        name, what = event["cell"], event["event"]
        write_event(self.plan.out, event)
        if what in ("started", "stage"):
            self.running[name] = event.get("stage", "")
        else:
            self.running.pop(name, None)
        if what == "done":
            self.done.append(name)
            self.seconds += event.get("seconds", 0.0)
        if what == "failed":
            self.failed[name] = event["error"]
        self.bar.update(self.task, completed=len(self.done) + len(self.failed), now=self._now())
        if not self.console.is_terminal and what in ("done", "failed", "died"):
            place = f"[{len(self.done) + len(self.failed)}/{self.total}]"
            said = {"done": f"in {event.get('seconds', 0):.0f} s"}.get(what, str(event.get("error", "")))
            logger.info("%s %s %s %s  (%s)", place, name, what, said, self._now(cells=False))

    def _now(self, cells: bool = True) -> str:
        left = self.total - len(self.done) - len(self.failed)
        words = [f"{len(self.running)} running", f"{len(self.failed)} failed"]
        if self.done and left:
            words.append(f"left {span(self.seconds / len(self.done) * left / max(1, min(self.workers, left)))}")
        if cells:
            words += [f"{name} {stage}".strip() for name, stage in self.running.items()]
        return ", ".join(words)


def write_event(out: Path, event: Mapping[str, Any]) -> None:
    """Append a line to ``status.jsonl``; short enough to stay whole beside other processes' lines."""
    line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **event, "error": event.get("error", "")[:500]})
    out.mkdir(parents=True, exist_ok=True)
    with (out / FILE).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def failures(plan: Plan) -> dict[str, str]:
    """The cells whose last attempt failed and whose outputs are not there, with their errors."""
    last: dict[str, Mapping[str, Any]] = {}
    file = plan.out / FILE
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:  # cut off by a kill
            continue
        last[event["cell"]] = event
    return {
        cell.name: last[cell.name]["error"]
        for cell in plan.cells
        if last.get(cell.name, {}).get("event") == "failed" and not plan.finished(cell)
    }


def write_failures(plan: Plan) -> dict[str, str]:
    """Write OUT/failures.md with the last lines of every failed cell's log; none, no file."""
    found = failures(plan)
    if not found:
        (plan.out / FAILURES).unlink(missing_ok=True)
        return found
    parts = [f"# Failed cells of {plan.name}\n"]
    for cell in plan.cells:
        if cell.name in found:
            lines = "\n".join(tail(plan.folder(cell) / "log.txt"))
            parts.append(f"## {cell.name}\n\n{found[cell.name]}\n\n```text\n{lines}\n```\n")
    write_text(plan.out / FAILURES, "\n".join(parts))
    return found
