"""A benchmark's figures from its records: micro, macro, pairs, and what else ``eval/benchmarks.yaml`` names.

All of them are shares of 1, whatever scale a task's own code reports, and none needs a second run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laavit.evaluation.benchmarks import benchmarks

Record = Mapping[str, Any]


def scores(records: Sequence[Record], benchmark: str) -> dict[str, float]:
    """The figures of a benchmark, or of a group of them, from the records of its questions.

    Args:
        records: ``records.jsonl`` of an evaluation; those of other tasks are left out.
        benchmark: a name of ``eval/benchmarks.yaml``, or any other task's, which has ``micro`` alone.

    Returns:
        "micro": right answers / questions, and the figures the benchmark names: "macro", "pair", ... A figure for
        which the records lack what it needs (groups: records written before there were any) is not there, and none
        is where there are no records.
    """
    entry = benchmarks().get(benchmark)
    names = {benchmark, *(entry.members if entry else ())}
    own = [record for record in records if record["task"] in names]
    if not own:
        return {}
    found = {"micro": _share(own)}
    for name, spec in (entry.figures if entry else {}).items():
        found |= _figure(own, name, spec)
    return found


def by_group(records: Sequence[Record], group: str) -> dict[str, list[Record]] | None:
    """The records of each member of a group, in order; None where one of them does not say its member."""
    members: dict[str, list[Record]] = {}
    for record in records:
        member = record["task"] if group == "task" else record.get("groups", {}).get(group)
        if member is None:
            return None
        members.setdefault(member, []).append(record)
    return members


def _figure(records: Sequence[Record], name: str, spec: Mapping[str, Any]) -> dict[str, float]:
    wanted = spec.get("where", {})
    records = [record for record in records if wanted.items() <= record.get("groups", {}).items()]
    if "positive" in spec:
        return _binary(records, spec["positive"])
    if "relabelled" in spec:
        value = _relabelled(records, set(spec["relabelled"]))
    elif "all" in spec:
        value = _all_right(records, spec["all"], spec.get("size", 1))
    else:
        value = _mean(records, spec["mean"])
    return {} if value is None else {name: value}


def _share(records: Sequence[Record]) -> float:
    return sum(bool(record["correct"]) for record in records) / len(records)


def _mean(records: Sequence[Record], groups: Sequence[str]) -> float | None:
    """The mean over the members of the first group of the mean over those of the next, ...: each weighs the same."""
    if not groups:
        return _share(records)
    members = by_group(records, groups[0])
    if not members:
        return None
    values = [value for part in members.values() if (value := _mean(part, groups[1:])) is not None]
    return sum(values) / len(values) if len(values) == len(members) else None


def _all_right(records: Sequence[Record], group: str, size: int) -> float | None:
    members = [part for part in (by_group(records, group) or {}).values() if len(part) >= size]
    return sum(all(record["correct"] for record in part) for part in members) / len(members) if members else None


def _relabelled(records: Sequence[Record], ids: set[str]) -> float | None:
    """Micro with the other of two letters as the label of ``ids``: right where a letter was read, and not today's."""
    if not ids <= {record["id"] for record in records} or any("read" not in record for record in records):
        return None
    right = [bool(r["read"]) and not r["correct"] if r["id"] in ids else bool(r["correct"]) for r in records]
    return sum(right) / len(right)


def _binary(records: Sequence[Record], positive: str) -> dict[str, float]:
    """Precision, recall and F1 of one of two answers, and its share of all answers. An answer that is neither counts
    as not positive (lmms-eval's POPE leaves it out of the recall, and takes yes_ratio from the labels: always 1/2)."""
    said = [str(record["read"] if "read" in record else record["prediction"]).strip().lower() for record in records]
    gold = [str(record["target"]).strip().lower() for record in records]
    hits = sum(one == other == positive for one, other in zip(said, gold))
    precision = hits / said.count(positive) if positive in said else 0.0
    recall = hits / gold.count(positive) if positive in gold else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        f"{positive}_ratio": said.count(positive) / len(records),
    }
