"""A part of a store as a store of its own, and stores as Parquet or JSON lines for other tools."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from laavit.files import TEMPORARY, write_bytes
from laavit.registry import UserError
from laavit.structures import Trace
from laavit.traces.schema import SEMANTICS_DTYPES, storage
from laavit.traces.store import TraceStore, TraceWriter

#: rows written at once
CHUNK = 64


def own(trace: Trace, columns: Collection[str]) -> Trace:
    """A trace without the verdicts that stand in columns of its store."""
    return replace(
        trace,
        verdicts={name: value for name, value in trace.verdicts.items() if name not in columns},
        scores={name: value for name, value in trace.scores.items() if name not in columns},
    )


def carry_verdicts(store: TraceStore, sources: Sequence[TraceStore]) -> list[str]:
    """Write the columns that the sources have on all traces of a store, and the notes beside them.

    Returns: the columns' names.

    Raises:
        UserError: two sources judge one sample differently.
    """
    merged: dict[str, dict[str, tuple[bool, float]]] = {}
    notes: dict[str, bytes] = {}
    for source in sources:
        for name, verdicts in source.verdicts().items():
            scores, column = source.scores(name), merged.setdefault(name, {})
            for key, verdict in verdicts.items():
                new = (verdict, scores[key])
                old = column.get(key, new)
                if str(old) != str(new):  # as text, since no figure (NaN) equals itself
                    raise UserError(f"the stores judge '{key}' differently by '{name}': {old} and {new}")
                column[key] = old
            note = source.path / "verdicts" / f"{name}.json"
            if note.is_file():
                notes[name] = note.read_bytes()
    complete = [name for name, column in merged.items() if all(key in column for key in store.ids)]
    for name in complete:
        column = {key: merged[name][key] for key in store.ids}
        store.write_verdicts(name, {k: v for k, (v, _) in column.items()}, {k: s for k, (_, s) in column.items()})
        if name in notes:
            write_bytes(store.path / "verdicts" / f"{name}.json", notes[name])
    return complete


def export_store(
    store: TraceStore,
    out: Path,
    ids: Sequence[str],
    top_k: int | None = None,
    semantics_dtype: str | None = None,
    selected: Mapping[str, Any] | None = None,
) -> TraceStore:
    """Some of a store's traces as a new store, with their verdicts.

    The header stays, but for ``gaze_top_k`` and ``semantics_dtype``, which say what is stored now, and ``exported``,
    which says from which store (its digest) and how the traces were chosen.

    Args:
        ids: the traces, in any order; the store's order is kept. top_k: keep the k strongest tokens of every map.
        selected: what the header says of how they were chosen.

    Raises:
        UserError: no trace left, more tokens asked for than the store keeps, no such dtype, ``out`` is not empty.
    """
    kept = store.header.get("gaze_top_k")
    if top_k is not None and kept is not None and top_k > kept:
        raise UserError(
            f"the store '{store.path}' keeps {kept} tokens of a map; --top-k {top_k} cannot bring others back"
        )
    wanted = set(ids)
    for key in sorted(wanted - set(store.ids))[:1]:
        store.get(key)  # says why there is none
    if not wanted:
        raise UserError(f"no trace of '{store.path}' is left to export: {len(store)} traces, none selected")
    header = {
        **store.header,
        "gaze_top_k": kept if top_k is None else top_k,
        "semantics_dtype": semantics_dtype or store.header.get("semantics_dtype", "float32"),
        "exported": {"from": store.digest(), "traces": len(store), **(selected or {})},
    }
    columns = set(store.verdicts())
    with TraceWriter(out, header) as writer:
        for key in _progress([key for key in store.ids if key in wanted]):
            writer.append(own(store.get(key), columns))
    new = TraceStore(out, verify=False)
    carry_verdicts(new, [store])
    return new


def _progress(ids: Sequence[str]) -> Iterable[str]:
    return track(ids, "exporting", console=Console(stderr=True), transient=True)


def plain_row(trace: Trace) -> dict[str, Any]:
    """A trace as plain data for other tools: dense maps, verdicts and scores as columns of their own."""
    row: dict[str, Any] = {
        "sample_id": trace.sample_id,
        "answer": trace.answer,
        "blind_answer": trace.blind_answer,
        "mass": trace.mass,
        "tiles": [
            {"height": t.height, "width": t.width, "image": t.image, "region": list(t.region)} for t in trace.tiles
        ],
        "gaze": trace.gaze.tolist(),
        "semantics": (trace.semantics if trace.semantics.ndim == 2 else trace.semantics[None]).tolist(),
        "semantic_tokens": None if trace.semantic_tokens is None else trace.semantic_tokens.tolist(),
        "steps": [{"text": s.text, "group": s.group, "gaze": s.gaze.tolist()} for s in trace.steps],
    }
    if trace.logits is not None:
        row["logits"] = {name: values.tolist() for name, values in vars(trace.logits).items()}
    row |= {f"verdict.{name}": value for name, value in trace.verdicts.items()}
    # no figure (a sample without boxes) is null, which every reader knows; NaN is no JSON
    return row | {f"score.{name}": None if math.isnan(value) else value for name, value in trace.scores.items()}


def _plain_schema(names: Sequence[str], logits: bool) -> pa.Schema:
    numbers = pa.list_(pa.float32())
    ids = pa.list_(pa.int32())
    kept = pa.struct({"tokens": ids, "ids": pa.list_(ids), "logprobs": pa.list_(numbers)})
    tile = pa.struct({"height": pa.int32(), "width": pa.int32(), "image": pa.int32(), "region": pa.list_(pa.float64())})
    return pa.schema(
        {
            "sample_id": pa.string(),
            "answer": pa.string(),
            "blind_answer": pa.string(),
            "mass": pa.float64(),
            "tiles": pa.list_(tile),
            "gaze": numbers,
            "semantics": pa.list_(numbers),
            "semantic_tokens": ids,
            "steps": pa.list_(pa.struct({"text": pa.string(), "group": pa.string(), "gaze": numbers})),
            **({"logits": kept} if logits else {}),
            **{f"verdict.{name}": pa.bool_() for name in names},
            **{f"score.{name}": pa.float64() for name in names},
        }
    )


def export_parquet(store: TraceStore, out: Path, ids: Sequence[str]) -> None:
    """Traces as one Parquet file; the store's header stands in its metadata as ``laavit``."""
    schema = _plain_schema(sorted(store.verdicts()), bool(storage(store.header)[2]))
    schema = schema.with_metadata({"laavit": json.dumps(store.header, ensure_ascii=False)})

    def write(path: Path) -> None:
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            rows: list[dict[str, Any]] = []
            for key in _progress(ids):
                rows.append(plain_row(store.get(key)))
                if len(rows) == CHUNK:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows = []
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema))

    _whole(out, write)


def export_jsonl(store: TraceStore, out: Path, ids: Sequence[str]) -> None:
    """Traces as JSON lines, one a trace."""

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            for key in _progress(ids):
                file.write(json.dumps(plain_row(store.get(key)), ensure_ascii=False, allow_nan=False) + "\n")

    _whole(out, write)


def _whole(out: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place and move it there: large ones are not held in memory."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.parent / f"{TEMPORARY}{os.getpid()}-{out.name}"
    try:
        write(beside)
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)


FORMATS = {"parquet": export_parquet, "jsonl": export_jsonl}
DTYPES = tuple(SEMANTICS_DTYPES)
