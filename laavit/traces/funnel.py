"""The filters' funnel: what each filter leaves alone, what all leave together, and by source set beside the paper's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from laavit.paths import project_data
from laavit.registry import UserError
from laavit.traces.store import TraceStore

#: the order of the paper (Sec. 4.1); other filters come after, by name
ORDER = ("correctness", "difficulty", "alignment")
#: the paper's counts (App. B), a file of eval/tables
PAPER = "lavit_sft_15k.yaml"


class Stage(NamedTuple):
    """One filter of the funnel: how many traces pass it alone, and how many pass it and all before it."""

    name: str
    alone: int
    together: int


@dataclass(frozen=True)
class Funnel:
    """Counts of a store's traces under its filters.

    Args:
        traces: all of them. stages: the filters in order. passed: ids that pass all. unjudged: filter -> traces without
            a verdict (they count as not passed).
    """

    traces: int
    stages: tuple[Stage, ...]
    passed: tuple[str, ...]
    unjudged: Mapping[str, int]


class SourceRow(NamedTuple):
    """One source set: traces, those that pass all filters, their share of all that pass, and the paper's."""

    source: str
    traces: int
    passed: int
    share: float
    paper: int | None
    paper_share: float | None


def filter_names(names: Sequence[str]) -> list[str]:
    """Columns in the funnel's order; notes of a filter (NAME.judge) are no stage of their own."""
    stages = [name for name in names if name.partition(".")[0] == name or name.partition(".")[0] not in names]
    known = [name for name in ORDER if name in stages]
    return known + sorted(name for name in stages if name not in ORDER)


def funnel(store: TraceStore, names: Sequence[str] | None = None) -> Funnel:
    """The funnel of a store's filters, or of those named, in the given order.

    Raises:
        UserError: no filter of that name was run on the store.
    """
    verdicts = store.verdicts()
    names = filter_names(list(verdicts)) if names is None else list(names)
    for name in names:
        store.scores(name)  # names the nearest where there is none
    left, stages, unjudged = list(store.ids), [], {}
    for name in names:
        column = verdicts[name]
        left = [key for key in left if column.get(key, False)]
        stages.append(Stage(name, sum(column.get(key, False) for key in store.ids), len(left)))
        if missing := sum(key not in column for key in store.ids):
            unjudged[name] = missing
    return Funnel(len(store), tuple(stages), tuple(left), unjudged)


def paper_counts(path: Path | None = None) -> dict[str, int]:
    """Samples of LaViT-SFT-15K by source set, as the paper gives them.

    Raises:
        UserError: the file is not ``paper: {total, sources: {name: count}}``, or the counts do not add up.
    """
    file = path or project_data("eval") / "tables" / PAPER
    try:
        paper = yaml.safe_load(file.read_text(encoding="utf-8"))["paper"]
        counts = {str(name): int(count) for name, count in paper["sources"].items()}
        total = int(paper["total"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"'{file}' does not read as the paper's counts: {error}") from error
    if sum(counts.values()) != total:
        raise UserError(f"'{file}': the sources add up to {sum(counts.values())}, not to {total}")
    return counts


def by_source(found: Funnel, store: TraceStore, sources: Mapping[str, str]) -> list[SourceRow]:
    """The store's traces by source set, most that pass first, beside the paper's counts.

    Args:
        sources: sample id -> source set; a trace whose sample is not in it counts under '?'.
    """
    paper = paper_counts()
    total = sum(paper.values())
    traces = Counter(sources.get(key, "?") for key in store.ids)
    passed = Counter(sources.get(key, "?") for key in found.passed)
    rows = []
    for source in sorted({*traces, *paper}, key=lambda name: (-passed[name], -paper.get(name, 0), name)):
        count = paper.get(source)
        share = passed[source] / max(len(found.passed), 1)
        rows.append(
            SourceRow(source, traces[source], passed[source], share, count, None if count is None else count / total)
        )
    return rows
