"""``make study``: the micro-lab's sweeps, run or gone on with, and what its README shows of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from laavit.commands import sweep
from laavit.commands.common import Parser, minutes
from laavit.files import read_object, write_json, write_text
from laavit.paths import project_data
from laavit.registry import UserError, nearest

logger = logging.getLogger(__name__)

#: sweep -> the arms that every other is compared with; in the order in which they are run
SWEEPS = {
    "table3": ("naive_sft", "lavit"),
    "hops": ("naive_sft", "gaze_final"),
    "hops_2": ("naive_sft", "gaze_final"),
    "hops_6": ("naive_sft", "gaze_layers"),
    "hops_9": ("naive_sft", "gaze_layers"),
    "causes": ("naive_sft", "lavit"),
}
#: run only by name: they look into what the others showed, and two hours are enough
APART = ("hops_2", "causes")
#: sweep -> the arms on whose first seed the standard interventions are made
INTERVENED = {"table3": ("lavit",), "hops": ("latents_by_layer", "feedback_steps_gaze")}
#: questions of each intervention
LIMIT = 300
OUT = Path("runs/study")


def marks(name: str) -> tuple[str, str]:
    """Between which lines of the README a sweep's results stand."""
    return f"<!-- laavit study: {name} -->", f"<!-- laavit study: {name} end -->"


def placed(readme: str, name: str, content: str) -> str:
    """The README with a sweep's results between its marks.

    Raises:
        UserError: it has none.
    """
    begin, end = marks(name)
    before, first, rest = readme.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise UserError(f"model_zoo/microlab/README.md lacks the marks '{begin}' and '{end}'")
    return f"{before}{begin}\n\n{content}\n{end}{after}"


def effects_of(record: Path, arm: str) -> Path:
    """Where what interventions on an arm changed is kept, beside the sweep's record."""
    return record.with_name(f"{record.stem}-{arm}-interventions.json")


def rendered(record: Path) -> str:
    """A record's table as Markdown, with its picture, and what interventions changed."""
    from laavit.reports.bars import effects_table
    from laavit.sweeps.record import read_rows
    from laavit.sweeps.study import study_table

    head, rows = read_rows(record)
    parts = [
        study_table(head["title"], rows, SWEEPS[record.stem]).to_markdown(),
        f"![{head['title']}: what each arm gains, with 95 % intervals](study/{record.stem}.png)\n",
    ]
    labels = {row.arm: row.label for row in rows if row.mode == "on"}
    for arm in INTERVENED.get(record.stem, ()):
        file = effects_of(record, arm)
        if file.is_file():
            table = replace(effects_table(read_object(file), file.name), title=f"Interventions on: {labels[arm]}")
            parts.append(table.to_markdown())
    return "\n".join(parts)


def intervene(plan: Any, name: str, record: Path) -> None:
    """Make the standard interventions on the first seed of some arms, where that is not done yet."""
    from laavit.commands import evaluate

    for arm in INTERVENED.get(name, ()):
        cell = next(cell for cell in plan.cells if cell.arm == arm)
        if not plan.finished(cell):
            continue
        # Beside eval/: there a second evaluation of the same questions would leave open which one a table shows.
        asked, out = plan.evaluate, plan.folder(cell) / f"interventions-{LIMIT}"
        if not (out / "interventions.json").is_file():
            words = [plan.model(cell), "--tasks", *asked.tasks, "--limit", str(LIMIT), "--out", str(out)]
            words += ["--batch-size", str(asked.batch_size), "--interventions", "standard"]
            evaluate.main([*words, *(["--data-root", asked.data_root] if asked.data_root else [])])
        write_json(effects_of(record, arm), read_object(out / "interventions.json"))


def lacking(plan: Any, name: str) -> list[str]:
    """The arms that a sweep's table compares with and that no run has answered yet."""
    done = {cell.arm for cell in plan.cells if "on" in plan.modes(cell) and plan.evaluated(cell, "on")}
    return [arm for arm in SWEEPS[name] if arm not in done]


def write(name: str, record: Path, folder: Path) -> None:
    """Draw a record's picture beside it, and put its table into the README of ``folder``."""
    from laavit.sweeps.record import read_rows
    from laavit.sweeps.study import draw

    head, rows = read_rows(record)
    draw(head["title"], rows, SWEEPS[name][0], record.with_suffix(".png"))
    readme = folder / "README.md"
    write_text(readme, placed(readme.read_text(encoding="utf-8"), name, rendered(record)))


def run(name: str, left: float | None, more: Sequence[str]) -> tuple[Any, int]:
    """Run what is left of a sweep; returns its plan and the sweep's exit code."""
    file = str(project_data("model_zoo") / "microlab" / "sweeps" / f"{name}.py")
    limit = [] if left is None else ["--max-minutes", f"{left:.4f}"]
    code = sweep.main([file, *limit, *more])
    options, _ = sweep.parser().parse_known_args([file])
    return sweep.plan_from(options, {})[0], code


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code: 1 where a run failed."""
    parser = Parser(
        prog="study",
        description="The micro-lab's study. It goes on where it was stopped; its results are what runs have left.",
    )
    which = f"of {', '.join(SWEEPS)}; default all but {', '.join(APART)}"
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help=which)
    parser.add_argument("--max-minutes", type=minutes, help="start no further run after so many minutes")
    parser.add_argument("--workers", help="runs at a time; default one a core")
    parser.add_argument("--render", action="store_true", help="run nothing: draw the records of the model zoo again")
    parser.add_argument("--write", action="store_true", help="put records, pictures and tables into model_zoo/microlab")
    options = parser.parse_args(list(argv))
    names = list(options.sweeps or (name for name in SWEEPS if name not in APART))
    for name in names:
        if name not in SWEEPS:
            raise UserError(f"study: no sweep is called '{name}'; {nearest(name, SWEEPS)}")
    zoo = project_data("model_zoo") / "microlab"
    began, worst = time.monotonic(), 0
    for name in names:
        kept = zoo / "study" / f"{name}.json"
        if not options.render:
            from laavit.sweeps.record import write_record

            left = None if options.max_minutes is None else options.max_minutes - (time.monotonic() - began) / 60
            if left is not None and left <= 0:
                logger.info("%s: no time is left; the same command goes on", name)
                continue
            plan, code = run(name, left, ["--workers", options.workers] if options.workers else [])
            worst = max(worst, code)
            if absent := lacking(plan, name):
                logger.info("%s: no table without %s; the same command goes on", name, ", ".join(absent))
                continue
            record = write_record(plan, kept if options.write else OUT / f"{name}.json")
            intervene(plan, name, record)
            if not options.write:
                write_text(OUT / f"{name}.md", rendered(record))
            logger.info("%s: %s", name, record)
        if options.write or options.render:
            write(name, kept, zoo)
    return worst
