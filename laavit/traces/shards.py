"""A trace store on disk: its schema, one shard's bytes, and the header. The classes that use them are in ``store.py``.

    store/
      header.json          {"schema": 1, "shard_size": 128, "header": {...}}
      shard-00000.arrow    an Arrow IPC stream of up to shard_size traces, memory-mapped when read
      shard-00000.json     {"count", "bytes", "sha256"} of the shard, written after it: without, it is unfinished
      verdicts/NAME.arrow  one filter's verdicts and scores: sample_id, verdict, score

Every file is written beside its place and moved there in one step. The bytes of a shard depend on its traces alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Features, List, Value

from laavit.files import write_bytes
from laavit.registry import UserError
from laavit.structures import Tile, Trace
from laavit.traces import gaze as gazes

SCHEMA = 1
SEMANTICS_DTYPES = {"float32": np.float32, "float16": np.float16}

Row = dict[str, Any]


def trace_features(semantics_dtype: str) -> Features:
    """The columns of a shard. ``gaze_indices`` is empty where the full map is stored."""
    return Features(
        {
            "sample_id": Value("string"),
            "answer": Value("string"),
            "grids": List(Value("int32")),  # height, width, height, width, ...
            "gaze_indices": List(Value("int32")),
            "gaze_values": List(Value("float32")),
            "semantics": List(Value(semantics_dtype)),
            "mass": Value("float64"),
            "verdict_names": List(Value("string")),
            "verdict_values": List(Value("bool")),
            "score_names": List(Value("string")),
            "score_values": List(Value("float64")),
        }
    )


VERDICT_FEATURES = Features({"sample_id": Value("string"), "verdict": Value("bool"), "score": Value("float64")})


def encode(trace: Trace, gaze_top_k: int | None, semantics_dtype: str) -> Row:
    """A trace as the row that is stored.

    Raises:
        UserError: the trace does not fit itself (gaze against grids), or has non-finite figures.
    """
    name = f"the trace of sample '{trace.sample_id}'"
    if not trace.sample_id:
        raise UserError("a trace has an empty sample id")
    tokens = sum(tile.cells for tile in trace.tiles)
    if trace.gaze.ndim != 1 or trace.gaze.shape[0] != tokens:
        raise UserError(
            f"{name} has a gaze of shape {tuple(trace.gaze.shape)} for tiles {trace.tiles} ({tokens} tokens)"
        )
    if trace.semantics.ndim != 1 or trace.semantics.shape[0] == 0:
        raise UserError(f"{name} has semantics of shape {tuple(trace.semantics.shape)}; allowed: one vector [D]")
    gaze = trace.gaze.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(gaze).all()) or bool((gaze < 0).any()):
        raise UserError(f"{name} has a gaze map with negative or non-finite entries")
    semantics = trace.semantics.detach().to("cpu", torch.float32)
    if semantics_dtype == "float16":
        semantics = semantics.half()
    if not bool(torch.isfinite(semantics).all()):
        raise UserError(
            f"{name} has semantics that are not finite as {semantics_dtype}; allowed: semantics_dtype float32"
        )
    if not math.isfinite(trace.mass):
        raise UserError(f"{name} has a mass of {trace.mass}")
    indices = torch.empty(0, dtype=torch.long)
    if gaze_top_k is not None:
        indices = gazes.top_k_indices(gaze, gaze_top_k)
        gaze = gaze[indices]
    return {
        "sample_id": trace.sample_id,
        "answer": trace.answer,
        "grids": np.asarray([(t.height, t.width) for t in trace.tiles], dtype=np.int32).reshape(-1),
        "gaze_indices": indices.to(torch.int32).numpy(),
        "gaze_values": gaze.numpy().copy(),
        "semantics": semantics.numpy().copy(),
        "mass": float(trace.mass),
        "verdict_names": [str(key) for key in trace.verdicts],
        "verdict_values": [bool(value) for value in trace.verdicts.values()],
        "score_names": [str(key) for key in trace.scores],
        "score_values": [float(value) for value in trace.scores.values()],
    }


def decode(row: Mapping[str, Any], sparse: bool) -> Trace:
    """A stored row as a trace with a dense gaze; tensors are copies, free of the memory map."""
    sides = np.asarray(row["grids"]).reshape(-1, 2).tolist()
    tiles = tuple(Tile(int(height), int(width), image) for image, (height, width) in enumerate(sides))
    values = torch.from_numpy(np.array(row["gaze_values"], dtype=np.float32))
    if sparse:
        dense = torch.zeros(sum(tile.cells for tile in tiles))
        values = dense.index_copy_(0, torch.from_numpy(np.array(row["gaze_indices"], dtype=np.int64)), values)
    return Trace(
        sample_id=row["sample_id"],
        answer=row["answer"],
        tiles=tiles,
        gaze=values,
        semantics=torch.from_numpy(np.array(row["semantics"], dtype=np.float32)),
        mass=row["mass"],
        verdicts=dict(zip(row["verdict_names"], row["verdict_values"], strict=True)),
        scores=dict(zip(row["score_names"], row["score_values"], strict=True)),
    )


def table_rows(table: pa.Table) -> list[Row]:
    """The rows of an Arrow table, number lists as NumPy arrays."""
    columns: dict[str, list[Any]] = {}
    for field in table.schema:
        column = table.column(field.name)
        numeric = pa.types.is_list(field.type) and (
            pa.types.is_floating(field.type.value_type) or pa.types.is_integer(field.type.value_type)
        )
        if numeric and not field.name.startswith("score"):
            columns[field.name] = [scalar.values.to_numpy(zero_copy_only=False) for scalar in column]
        else:
            columns[field.name] = column.to_pylist()
    return [{name: values[place] for name, values in columns.items()} for place in range(table.num_rows)]


def stream_bytes(rows: Sequence[Row], features: Features) -> bytes:
    """Rows as one Arrow IPC stream of one record batch; equal rows give equal bytes."""
    schema = features.arrow_schema
    arrays = [_array([row[field.name] for row in rows], field.type) for field in schema]
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return sink.getvalue()


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    offsets = np.cumsum([0, *(len(value) for value in values)]).astype(np.int32)
    inner = kind.value_type
    if pa.types.is_string(inner) or pa.types.is_boolean(inner):
        flat = pa.array([entry for value in values for entry in value], inner)
    else:
        flat = pa.array(np.concatenate([np.asarray(value, inner.to_pandas_dtype()) for value in values]), inner)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=kind)


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard is; its record stands beside it as ``.json``."""
    return folder / f"shard-{index:05d}.arrow"


def shard_indices(folder: Path) -> list[int]:
    """The numbers of all shards that have a file, finished or not, in order."""
    stems = {file.stem for file in folder.glob("shard-*") if file.suffix in (".arrow", ".json")}
    numbers = [stem.removeprefix("shard-") for stem in stems]
    return sorted(int(number) for number in numbers if number.isdecimal())


def write_shard(folder: Path, index: int, rows: Sequence[Row], features: Features) -> None:
    """Write a shard and then its record."""
    path, content = shard_path(folder, index), stream_bytes(rows, features)
    record = {"count": len(rows), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_bytes(path, content)
    write_bytes(path.with_suffix(".json"), canonical(record))


def shard_record(folder: Path, index: int, verify: bool = True) -> dict[str, Any] | None:
    """The shard's {"count", "bytes", "sha256"}; ``None`` where it is unfinished, truncated or (``verify``) changed."""
    path = shard_path(folder, index)
    try:
        record = json.loads(path.with_suffix(".json").read_bytes())
        count, size, sha256 = int(record["count"]), int(record["bytes"]), str(record["sha256"])
        if count < 1 or path.stat().st_size != size:
            return None
        if verify:
            total = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    total.update(block)
            if total.hexdigest() != sha256:
                return None
    except (OSError, ValueError, KeyError, TypeError):  # any of them means: not a finished shard, so it is done again
        return None
    return {"count": count, "bytes": size, "sha256": sha256}


def canonical(value: Any) -> bytes:
    """JSON with sorted keys: equal content, equal bytes."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False).encode()


def read_header(folder: Path) -> dict[str, Any] | None:
    """The content of ``header.json``; ``None`` where the folder holds no store.

    Raises:
        UserError: the file is broken, or of another schema version.
    """
    path = folder / "header.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        version, size, header = content["schema"], content["shard_size"], content["header"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is not the header of a trace store") from error
    if version != SCHEMA:
        raise UserError(f"the trace store '{folder}' has schema {version}; this version reads schema {SCHEMA}")
    if not isinstance(header, dict) or not isinstance(size, int):
        raise UserError(f"'{path}' is not the header of a trace store")
    return {"schema": version, "shard_size": size, "header": header}


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], subset: bool, prefix: str = "") -> list[str]:
    """What differs, one sentence part a dotted key; with ``subset``, keys that only ``found`` has are fine."""
    parts: list[str] = []
    for key in sorted({*wanted, *([] if subset else found)}):
        name = f"{prefix}{key}"
        there, here = found.get(key), wanted.get(key)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            parts += differences(there, here, subset, f"{name}.")
        elif key not in found or key not in wanted or there != here:
            old = repr(there) if key in found else "missing"
            new = repr(here) if key in wanted else "missing"
            parts.append(f"'{name}' is {old} in the store and {new} here")
    return parts
