"""Per-sample records, and the summary that is computed from them and from nothing else.

A record is one JSON line: ``task``, ``id``, ``prediction``, ``target``, ``correct``, and where known ``kind`` (what the
benchmark calls a category), ``groups`` (what ``eval/benchmarks.yaml`` asks to keep for pairs and means), ``read`` (what
the judge read in the prediction, null where nothing) and ``seconds``; of a student that emits its latents
``latents_written``, their number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from laavit.evaluation.benchmarks import benchmarks
from laavit.evaluation.scores import scores
from laavit.evaluation.statistics import wilson
from laavit.files import write_text
from laavit.registry import UserError

#: Columns that name a question, and those that name its kind, in the order they are looked for.
ID_COLUMNS = ("id", "idx", "question_id", "index", "Index")
KIND_COLUMNS = ("kind", "category", "sub_task")
#: Where the judges of lmms-eval's tasks, and ours, say what they read in a prediction.
READ_KEYS = ("read", "pred_letter", "pred_parsed", "prediction")


def make_records(
    task: str,
    samples: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    seconds: Mapping[Any, float],
    written: Mapping[Any, int] | None = None,
    whole: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Records of one task from lmms-eval's logged samples, in the order of its documents.

    Args:
        task: its name. samples: lmms-eval's ``results["samples"][task]``.
        metrics: the task's metric names, in its own order; the first one found in a sample judges it.
        seconds: a document's index -> seconds of generation. written: the same -> latents that the model wrote.
        whole: the columns ``ID_COLUMNS`` of all documents, where the samples may be some of them: a question has the
            same id however many others are asked.

    Raises:
        UserError: the task does not judge single answers as right or wrong, or its data lack a column.
    """
    entry = benchmarks().get(task)
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    column = _id_column([sample["doc"] for sample in samples] if whole is None else whole)
    records = []
    for sample in samples:
        document = sample["doc"]
        record: dict[str, Any] = {
            "task": task,
            "id": str(sample["doc_id"] if column is None else document[column]),
            "prediction": sample["filtered_resps"][0],
            "target": sample["target"],
            **_judged(task, sample, metrics),
        }
        columns = (entry.kind,) if entry and entry.kind else KIND_COLUMNS
        kind = next((document[name] for name in columns if document.get(name)), None)
        if kind is not None:
            record["kind"] = str(kind)
        if entry and entry.groups:
            record["groups"] = entry.groups_of(document)
        if sample["doc_id"] in seconds:
            record["seconds"] = round(seconds[sample["doc_id"]], 6)
        if written is not None and sample["doc_id"] in written:
            record["latents_written"] = written[sample["doc_id"]]
        records.append(record)
    return records


def _id_column(documents: Sequence[Mapping[str, Any]]) -> str | None:
    """The first id column that every document has and no two share."""
    for name in ID_COLUMNS:
        values = {str(document[name]) for document in documents if document.get(name) is not None}
        if len(values) == len(documents):
            return name
    return None


def _judged(task: str, sample: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """Benchmarks say right or wrong in three ways: a figure, {"is_correct": …} or {"score": …}."""
    for name in metrics:
        value = sample.get(name)
        right = value.get("is_correct", value.get("score")) if isinstance(value, Mapping) else value
        if right not in (0, 1):
            continue
        said = [value[key] for key in READ_KEYS if key in value] if isinstance(value, Mapping) else []
        return {"correct": bool(right)} | ({"read": said[0] or None} if said else {})
    raise UserError(f"task '{task}' gives no right or wrong for a single answer (metrics: {', '.join(metrics)})")


def summarise(records: Iterable[Mapping[str, Any]], level: float = 0.95) -> dict[str, dict[str, Any]]:
    """Accuracy with Wilson's interval for each task, and within it for each kind.

    Returns:
        task -> {"n", "accuracy", "low", "high", "by_kind": {kind: {"n", "accuracy", "low", "high"}}}; of a benchmark
        also "figures" (``scores``); where its judge says what it read "unread", the number of answers in which it found
        nothing; of a student that emits its latents "latents_written": {"mean", "without"}, the latter the number of
        answers without any.
    """
    records = list(records)
    tasks: dict[str, dict[str | None, list[bool]]] = {}
    written: dict[str, list[int]] = {}
    unread: dict[str, int] = {}
    for record in records:
        if "latents_written" in record:
            written.setdefault(record["task"], []).append(record["latents_written"])
        if "read" in record:
            unread[record["task"]] = unread.get(record["task"], 0) + (record["read"] is None)
        kinds = tasks.setdefault(record["task"], {None: []})
        kinds[None].append(record["correct"])
        if record.get("kind") is not None:
            kinds.setdefault(record["kind"], []).append(record["correct"])
    return {
        task: {
            **_share(kinds[None], level),
            "by_kind": {kind: _share(kinds[kind], level) for kind in sorted(k for k in kinds if k is not None)},
            **({"figures": scores(records, task)} if task in benchmarks() else {}),
            **({"unread": unread[task]} if task in unread else {}),
            **({"latents_written": _written(written[task])} if task in written else {}),
        }
        for task, kinds in tasks.items()
    }


def _written(counts: Sequence[int]) -> dict[str, float]:
    return {"mean": sum(counts) / len(counts), "without": counts.count(0)}


def _share(correct: Sequence[bool], level: float) -> dict[str, Any]:
    low, high = wilson(sum(correct), len(correct), level)
    return {"n": len(correct), "accuracy": sum(correct) / len(correct), "low": low, "high": high}


def weights_sha256(folder: str | Path) -> str | None:
    """SHA-256 over the folder's safetensors files, names and contents in order; None for what is not a folder."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def write_records(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records of a ``records.jsonl``.

    Raises:
        UserError: there is no such file, or a line is not JSON.
    """
    if not file.is_file():
        raise UserError(f"there are no evaluation records at '{file}'")
    records = []
    # not splitlines(): an answer may hold U+2028 and its like, which JSON leaves as they are
    for number, line in enumerate(file.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} of '{file}' is not valid JSON: {error}") from error
    return records
