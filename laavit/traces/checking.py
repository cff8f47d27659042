"""Everything that can be wrong with a store on disk, beyond what opening it finds: content as well as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import track

from laavit.traces import shards
from laavit.traces.schema import VERDICT_FEATURES, storage, trace_features
from laavit.traces.store import TraceStore, verify

#: columns of numbers that have to be finite
FINITE = ("mass", "gaze_values", "semantics", "step_values", "logprobs")


def problems(path: str | Path) -> dict[str, str]:
    """File -> what is wrong with it; empty where all is well.

    Files, hashes, ids and their order (``store.verify``); then the columns of every shard, that its figures are finite
    and maps not negative, that every trace reads; and that the filters' columns fit the traces.

    Raises:
        UserError: there is no store, or its header is broken or of another schema version.
    """
    folder = Path(path)
    found = verify(folder)
    header = shards.read_header(folder)
    assert header is not None, "verify has read it"
    _, dtype, logits = storage(header.content)
    schema = trace_features(dtype, logits).arrow_schema
    names = [shards.shard_path(folder, index).name for index in range(header.shards)]
    for name in track(names, "checking shards", console=Console(stderr=True), transient=True):
        if name not in found and (reason := _content(folder / name, schema, dtype)):
            found[name] = reason
    if not found:
        found |= _traces(folder)
    return found


def _content(file: Path, schema: pa.Schema, dtype: str) -> str:
    """What is wrong with a shard's columns, '' for nothing; a column of it in memory at a time."""
    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_stream(source).read_all()
    if not table.schema.equals(schema):
        return f"has the columns {', '.join(table.schema.names)}, or other types; schema {shards.SCHEMA} has others"
    for name in (name for name in FINITE if name in table.schema.names):
        column = table.column(name).combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        values = (column.flatten() if pa.types.is_list(column.type) else column).to_numpy(zero_copy_only=False)
        if name == "semantics" and dtype == "bfloat16":  # all bits of the exponent set: infinite or no number
            bad = bool(((values & 0x7F80) == 0x7F80).any())
        else:
            bad = not bool(np.isfinite(values).all())
        if bad:
            return f"has figures in '{name}' that are not finite"
        if name.endswith("_values") and bool((values < 0).any()):
            return f"has a map in '{name}' with negative entries"
    return ""


def _traces(folder: Path) -> dict[str, str]:
    """What is wrong with single traces and with the filters' columns of a store whose shards are sound."""
    found: dict[str, str] = {}
    for file in sorted((folder / "verdicts").glob("[!.]*.arrow")):
        if reason := _verdicts(file):
            found[f"verdicts/{file.name}"] = reason
    if found:
        return found
    store = TraceStore(folder, verify=False)
    for number, key in enumerate(track(store.ids, "reading traces", console=Console(stderr=True), transient=True)):
        try:
            trace = store[number]
        except (ValueError, IndexError, RuntimeError) as error:  # columns whose lengths do not fit each other
            found[f"sample '{key}'"] = f"does not read: {error}"
            continue
        if trace.gaze.numel() != sum(tile.cells for tile in trace.tiles):
            found[f"sample '{key}'"] = f"has a map of {trace.gaze.numel()} tokens for tiles {trace.tiles}"
    for name, column in store.verdicts().items():
        if strays := [key for key in column if key not in store]:
            found[f"verdicts/{name}.arrow"] = f"judges sample '{strays[0]}', which has no trace ({len(strays)} in all)"
        elif len(column) != len(store):
            found[f"verdicts/{name}.arrow"] = f"judges {len(column)} of {len(store)} traces: run the filter again"
    return found


def _verdicts(file: Path) -> str:
    wanted: Any = VERDICT_FEATURES.arrow_schema
    try:
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_stream(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        return f"does not read: {str(error).splitlines()[0]}"
    return "" if table.schema.equals(wanted) else "has other columns than sample_id, verdict and score"
