"""Filters over a whole store: one pass, bounded memory, a column each, and a note of the settings it was made with."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from laavit.files import write_bytes
from laavit.registry import UserError
from laavit.structures import Sample, Trace
from laavit.traces.filters import Filter, Judgement
from laavit.traces.shards import canonical
from laavit.traces.store import TraceStore

logger = logging.getLogger(__name__)

#: samples judged together: what a filter with a model behind it can batch
CHUNK = 256


def check(filters: Mapping[str, Filter], header: Mapping[str, Any], ids: Sequence[str] = ()) -> None:
    """Refuse what the filters could not judge: a store's header, or what an extraction is about to write into one.

    Raises:
        UserError: naming the filter, and what to change.
    """
    for name, judgement in filters.items():
        if hasattr(judgement, "check"):
            try:
                judgement.check(header, ids)
            except UserError as error:
                raise UserError(f"filters.{name}: {error}") from error


def judge(store: TraceStore, samples: Iterable[Sample], name: str, judgement: Filter) -> int:
    """``judge_all`` of one filter; returns how many samples pass."""
    return judge_all(store, samples, {name: judgement})[name]


def judge_all(
    store: TraceStore,
    samples: Iterable[Sample],
    filters: Mapping[str, Filter],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Run filters over all traces of a store in one pass and write their columns; returns how many samples pass each.

    Samples without a trace are left out. Memory: one chunk of traces, and id, verdict and score a sample and filter.

    Args:
        settings: filter's name -> what made it (its part of the recipe), kept beside the column.

    Raises:
        UserError: a filter cannot judge this store (before the first sample), a trace has no sample, or a sample occurs
            twice.
    """
    check(filters, store.header, store.ids)
    columns: dict[str, dict[str, tuple[bool, float]]] = {name: {} for name in filters}
    for pairs in _chunks(store, samples):
        for name, judgement in filters.items():
            for (sample, _), found in zip(pairs, _judged(judgement, pairs), strict=True):
                if sample.id in columns[name]:
                    raise UserError(f"the data have the sample '{sample.id}' twice")
                columns[name][sample.id] = (found.verdict, found.score)
                for key, value in found.notes.items():
                    columns.setdefault(f"{name}.{key}", {})[sample.id] = value
    for name, column in columns.items():
        store.write_verdicts(name, {k: v for k, (v, _) in column.items()}, {k: s for k, (_, s) in column.items()})
        note = {"filter": dict((settings or {}).get(name.partition(".")[0]) or {})}
        write_bytes(store.path / "verdicts" / f"{name}.json", canonical(note))
    return {name: sum(verdict for verdict, _ in columns[name].values()) for name in filters}


def settings_of(store: TraceStore, name: str) -> dict[str, Any]:
    """What a filter's column was made with; {} where nothing is noted."""
    file = store.path / "verdicts" / f"{name}.json"
    try:
        return dict(json.loads(file.read_bytes())["filter"]) if file.is_file() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{file}' is not the note of a filter") from error


def _judged(judgement: Filter, pairs: Sequence[tuple[Sample, Trace]]) -> list[Judgement]:
    if hasattr(judgement, "many"):
        return list(judgement.many(pairs))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # maps are small: threads that wait for each other cost up to 20 times the work
    try:
        return [Judgement(*judgement(sample, trace)) for sample, trace in pairs]
    finally:
        torch.set_num_threads(threads)


def with_traces(samples: Iterable[Sample], store: TraceStore) -> Iterator[Sample]:
    """The samples that have a trace; where the data know their ids, the others' images are not even looked for."""
    ids = getattr(samples, "ids", None)
    if ids is not None and isinstance(samples, Sequence):
        yield from (samples[place] for place, key in enumerate(ids) if key in store)
    else:
        yield from (sample for sample in samples if sample.id in store)


def _chunks(store: TraceStore, samples: Iterable[Sample]) -> Iterator[list[tuple[Sample, Trace]]]:
    chunk: list[tuple[Sample, Trace]] = []
    console = Console(stderr=True)
    for sample in track(with_traces(samples, store), "judging", total=len(store), console=console, transient=True):
        chunk.append((sample, store.get(sample.id)))
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
