"""A run folder, read: recipe, environment, log, evaluation records, gaze samples. Nothing is computed here.

What a folder may hold (architecture.md, "Run folder"); only what is asked for must be there:

    recipe.json, environment.json, log.jsonl
    eval/<name>/records.jsonl, eval/<name>/summary.json
    eval/<name>/interventions.json
    gaze/index.json, gaze/*.png, gaze/statistics.json
    analysis/<name>.json, analysis/<name>.png (or .svg)

A sweep's folder (sweep.json, cells/<arm>-s<seed>/) stands for its cells, the seeds of an arm under one label.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laavit.evaluation.records import read_records
from laavit.files import read_object
from laavit.registry import UserError

logger = logging.getLogger(__name__)

#: the plan of a sweep
SWEEP = "sweep.json"


@dataclass(frozen=True)
class Record:
    """One evaluated sample; ``key`` is what two runs are paired by."""

    task: str
    id: str
    correct: bool
    kind: str | None = None
    groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return (self.task, self.id)


@dataclass(frozen=True)
class Evaluation:
    """The records of one evaluation of one run, and where they came from.

    Args:
        name: the folder under ``eval/``. latents: 'on', 'off', or how many stood in the prompt.
        weights: the SHA-256 of the evaluated weights, as the evaluation wrote it down.
        source: the records file, relative to the run's parent. digest: the SHA-256 of that file.
        intervention: what was changed at inference, by name. protocol: how it was asked and judged.
        effects: ``interventions.json``, what changes changed; empty where none were made.
        seed: the run's; None for a model that hangs on none. Runs of one seed began alike.
    """

    name: str
    latents: str
    weights: str
    records: tuple[Record, ...]
    source: str
    digest: str
    intervention: str = ""
    protocol: str = "lmms"
    effects: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None

    @property
    def way(self) -> str:
        """What was changed at inference, as it follows a label: '' for the model as it is."""
        latents = {"on": "", "off": ", latents off"}.get(self.latents, f", {self.latents} latents")
        return latents + (f", {self.intervention}" if self.intervention else "")


@dataclass(frozen=True)
class Analysis:
    """One analysis: its figures as they were written, and its picture."""

    name: str
    figures: Mapping[str, Any]
    picture: Path | None


@dataclass(frozen=True)
class GazeSample:
    """One sample image with who looked where. Maps are float64 [h, w]; boxes are normalised xyxy."""

    id: str
    image: Path
    question: str
    answer: str
    boxes: tuple[tuple[float, float, float, float], ...]
    maps: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Run:
    """Everything a report reads of one run folder. Parts that the folder does not hold are empty."""

    path: Path
    label: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_hash: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    log: tuple[Mapping[str, Any], ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    gaze: tuple[GazeSample, ...] = ()
    statistics: Mapping[str, Any] = field(default_factory=dict)
    analyses: tuple[Analysis, ...] = ()
    arm: str = ""

    @property
    def title(self) -> str:
        """What a table's rows know it by: its arm in a sweep, else its recipe's title, else its folder's name."""
        return self.arm or str(self.recipe.get("title") or self.path.name)


def load_run(path: Path, label: str | None = None) -> Run:
    """Read one run folder.

    Raises:
        UserError: the folder is not there, or a file in it is damaged or contradicts another.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no run folder at {path}")
    recipe_file = path / "recipe.json"
    recipe = read_object(recipe_file)
    folders = [file.parent for file in sorted(path.glob("eval/*/records.jsonl"))]
    return Run(
        path=path,
        label=label or path.name,
        recipe=recipe,
        recipe_hash=_digest(recipe_file) if recipe_file.is_file() else "",
        environment=read_object(path / "environment.json"),
        log=_read_log(path / "log.jsonl"),
        evaluations=tuple(_read_evaluation(folder, path, recipe.get("seed")) for folder in folders),
        gaze=_read_gaze(path / "gaze"),
        statistics=read_object(path / "gaze" / "statistics.json"),
        analyses=_read_analyses(path / "analysis"),
    )


def load_runs(words: Sequence[Path | str], labels: Sequence[str | None] | None = None) -> list[Run]:
    """Read several run folders, in the order they are to be shown; seeds of one model share a label.

    Args:
        words: each a run folder, LABEL=RUN or LABEL=RUN,RUN (the seeds of one model), or the folder of a sweep.
        labels: one for each word, in place of its own (a sweep's arms have theirs); None: LABEL, or the folder's name.

    Raises:
        UserError: no folder, another number of labels than words, two models with one label, or no evaluation at all.
    """
    if not words:
        raise UserError("a report needs at least one run folder")
    if labels is not None and len(labels) != len(words):
        raise UserError(f"got {len(labels)} labels for {len(words)} runs; give one for each run, or none")
    models = [_models(word, labels[i] if labels else None) for i, word in enumerate(words)]
    named = [label for model in models for label in dict.fromkeys(run.label for run in model)]
    twice = [label for label, count in Counter(named).items() if count > 1]
    if twice:
        raise UserError(f"two runs are called '{twice[0]}'; give them labels of their own, or LABEL=RUN,RUN for seeds")
    runs = [run for model in models for run in model]
    if not any(run.evaluations for run in runs):
        names = ", ".join(str(run.path) for run in runs)
        raise UserError(f"none of {names} holds eval/*/records.jsonl; evaluate a run first (tools/eval.py)")
    return runs


def split_word(word: Path | str) -> tuple[str | None, list[Path]]:
    """'LABEL=RUN,RUN' -> (label, folders); a word that is a folder itself has no label."""
    label, equals, folders = str(word).partition("=")
    if not equals or Path(word).is_dir():
        return None, [Path(word)]
    return label, [Path(folder) for folder in folders.split(",") if folder]


def _models(word: Path | str, label: str | None) -> list[Run]:
    given, folders = split_word(word)
    if not folders:
        raise UserError(f"'{word}' names no run folder; for example '{given}=runs/a,runs/b'")
    if given is None and (folders[0] / SWEEP).is_file():
        return load_sweep(folders[0])
    return [load_run(folder, label or given) for folder in folders]


def load_sweep(folder: Path) -> list[Run]:
    """The cells of a sweep that are there, labelled by their arms.

    Raises:
        UserError: its plan cannot be read, or no cell has been run.
    """
    plan = read_object(folder / SWEEP)
    runs = []
    cells = plan.get("cells", ())
    seeds = Counter(cell["arm"] for cell in cells)
    for cell in cells:
        path = folder / "cells" / cell["name"]
        if path.is_dir():
            run = load_run(path, cell.get("label") or cell["arm"])
            # a model that is evaluated as it is hangs on the seed where there is one of it for each
            seed = cell.get("seed") if run.recipe or seeds[cell["arm"]] > 1 else None
            evaluations = tuple(replace(one, seed=seed) for one in run.evaluations)
            runs.append(replace(run, arm=cell["arm"], evaluations=evaluations))
        else:
            logger.warning("%s has not been run", path)
    if not runs:
        raise UserError(f"'{folder}' holds no cell that was run; laavit sweep runs them")
    return runs


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_log(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The logged steps in order; a step that was logged again after a resume counts once, as it was logged last."""
    if not path.is_file():
        return ()
    steps: dict[int, Mapping[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # a run that was killed while it wrote
                logger.warning("%s ends in the middle of line %d, which is left out", path, number)
                continue
            raise UserError(f"{path}, line {number} is not valid JSON: {error}") from error
        if "iter" in entry:
            steps[int(entry["iter"])] = entry
    return tuple(steps[i] for i in sorted(steps))


def _read_evaluation(folder: Path, run: Path, seed: int | None) -> Evaluation:
    file = folder / "records.jsonl"
    records: dict[tuple[str, str], Record] = {}
    for number, row in enumerate(read_records(file), start=1):
        absent = [key for key in ("task", "id", "correct") if key not in row]
        if absent:
            raise UserError(f"{file}, line {number} has no '{absent[0]}'; a record has a task, an id and correct")
        record = Record(str(row["task"]), str(row["id"]), row["correct"], row.get("kind"), row.get("groups") or {})
        if not isinstance(record.correct, bool):
            raise UserError(f"{file}, line {number}: 'correct' is {record.correct!r}; true and false are allowed")
        if record.key in records:
            raise UserError(f"{file}, line {number} holds sample '{record.id}' of '{record.task}' a second time")
        records[record.key] = record
    if not records:
        raise UserError(f"{file} is empty; evaluate the run again")
    summary = read_object(folder / "summary.json")
    changed = summary.get("intervention")
    _check_summary(folder / "summary.json", summary, list(records.values()))
    return Evaluation(
        name=folder.name,
        latents=str(summary.get("latents", "on")),
        weights=str(summary.get("weights_sha256") or ""),
        records=tuple(records.values()),
        source=str(file.relative_to(run.parent)),
        digest=_digest(file),
        intervention=str(changed.get("name", changed.get("type")) if isinstance(changed, Mapping) else changed or ""),
        protocol=str(summary.get("protocol", "lmms")),
        effects=read_object(folder / "interventions.json"),
        seed=seed,
    )


def _check_summary(path: Path, summary: Mapping[str, Any], records: Sequence[Record]) -> None:
    """A summary that does not follow from its records is not shown, nor are the records."""
    for task, said in summary.get("tasks", {}).items():
        found = [record.correct for record in records if record.task == task]
        share = sum(found) / len(found) if found else float("nan")
        if said["n"] != len(found) or not abs(said["accuracy"] - share) < 1e-6:
            raise UserError(
                f"{path} says {said['accuracy']} of {said['n']} for '{task}', its records say {share} of {len(found)}; "
                "evaluate the run again"
            )


def _read_analyses(folder: Path) -> tuple[Analysis, ...]:
    found = []
    for file in sorted(folder.glob("*.json")):
        pictures = [path for path in (file.with_suffix(".png"), file.with_suffix(".svg")) if path.is_file()]
        found.append(Analysis(file.stem, read_object(file), pictures[0] if pictures else None))
    return tuple(found)


def _read_gaze(folder: Path) -> tuple[GazeSample, ...]:
    index = folder / "index.json"
    if not index.is_file():
        return ()
    samples = []
    for entry in json.loads(index.read_text(encoding="utf-8")):
        image = folder / entry["image"]
        if not image.is_file():
            raise UserError(f"{index} names the image '{entry['image']}', which is not in {folder}")
        maps = {}
        for name, given in entry["maps"].items():
            height, width = given["grid"]
            values = np.asarray(given["values"], dtype=np.float64)
            if values.size != height * width:
                raise UserError(
                    f"{index}, sample '{entry['id']}': the map '{name}' has {values.size} values for a grid of "
                    f"{height} x {width}"
                )
            maps[name] = values.reshape(height, width)
        boxes = tuple((float(b[0]), float(b[1]), float(b[2]), float(b[3])) for b in entry["boxes"])
        samples.append(GazeSample(str(entry["id"]), image, entry["question"], entry["answer"], boxes, maps))
    return tuple(samples)
