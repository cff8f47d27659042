"""What a sweep found, small enough to be kept beside its recipes: which questions each run answered rightly.

One JSON file: the questions once, and a row of bits a run and mode. All figures of a table (shares, intervals, paired
differences) follow from it, so that a table can be drawn again, or doubted, without the runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from laavit.files import read_object, write_text
from laavit.registry import UserError
from laavit.reports.runs import Evaluation, Record
from laavit.sweeps.plan import Plan
from laavit.sweeps.table import Row, rows_of

SCHEMA = 1


def record_of(plan: Plan) -> dict[str, Any]:
    """The record of what is there of a sweep.

    Returns:
        ``questions``: [task, id, kind] each; ``rows``: arm, label, latents, seed, how many seeds are planned,
        whether the arm hangs on its seed, the hash of the weights that answered, and ``right``, a bit a question in
        their order, as hexadecimal digits (the first question is the highest bit of the first digit); and the plan's
        ``name``, ``title``, ``reference``.

    Raises:
        UserError: nothing has been evaluated, or two runs answered different questions.
    """
    questions: list[list[str | None]] | None = None
    rows: list[dict[str, Any]] = []
    for row in rows_of(plan):
        for seed, evaluation in row.seeds.items():
            asked = [[record.task, record.id, record.kind] for record in evaluation.records]
            questions = questions or asked
            if asked != questions:
                raise UserError(f"'{evaluation.source}' answers other questions than the other runs of the sweep")
            right = np.packbits([record.correct for record in evaluation.records]).tobytes().hex()
            own = {"arm": row.arm, "label": row.label, "latents": row.mode, "seed": seed, "planned": row.planned}
            rows.append({**own, "seeded": row.seeded, "weights": evaluation.weights, "right": right})
    if questions is None:
        raise UserError(f"nothing of the sweep in '{plan.out}' has been evaluated yet")
    head = {"schema": SCHEMA, "name": plan.name, "title": plan.title, "reference": plan.reference}
    return {**head, "questions": questions, "rows": rows}


def write_record(plan: Plan, file: Path) -> Path:
    """Write ``record_of`` as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(record_of(plan), ensure_ascii=False) + "\n")
    return file


def read_rows(file: Path) -> tuple[dict[str, Any], list[Row]]:
    """The rows that a record holds, as ``rows_of`` gives them, after its head (name, title, reference).

    Raises:
        UserError: there is no such file, or it is no record.
    """
    if not file.is_file():
        raise UserError(f"there is no record of a sweep at '{file}'; `laavit study` writes them")
    content = read_object(file)
    if content.get("schema") != SCHEMA:
        raise UserError(f"'{file}' is no record of a sweep of schema {SCHEMA}, but of {content.get('schema')}")
    questions = content.pop("questions")
    found: dict[tuple[str, str], dict[int, Evaluation]] = {}
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for one in content.pop("rows"):
        key = one["arm"], one["latents"]
        first.setdefault(key, one)
        found.setdefault(key, {})[one["seed"]] = _evaluation(one, questions, file)
    rows = []
    for key, seeds in found.items():
        own = first[key]
        rows.append(Row(own["label"], *key, seeds, own["planned"], own.get("seeded", True)))
    return content, rows


def _evaluation(one: Mapping[str, Any], questions: list[list[str]], file: Path) -> Evaluation:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(one["right"]), dtype=np.uint8))[: len(questions)].astype(bool)
    records = tuple(
        Record(task, name, bool(correct), kind) for (task, name, kind), correct in zip(questions, bits, strict=True)
    )
    source = f"{file.name}: {one['arm']}, seed {one['seed']}, latents {one['latents']}"
    return Evaluation(source, one["latents"], one["weights"], records, source, "")
