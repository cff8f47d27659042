"""A trace store on disk: its files, one shard's bytes, the header, and what is damaged or missing.

    store/
      header.json          {"schema": 2, "shard_size": 128, "samples": {"count", "sha256"}, "header": {...}}
      shard-00000.arrow    an Arrow IPC stream of the traces of up to shard_size samples, memory-mapped when read
      shard-00000.json     its record, written after it (without, it is unfinished): {"count", "bytes", "sha256",
                           "samples": digest of its samples' ids, "quarantined": {sample id: reason}}
      verdicts/NAME.arrow  one filter's verdicts and scores: sample_id, verdict, score

Shard i holds the samples from i * shard_size on, in their order, without those that were put aside ("quarantined"), so
the header alone says which shards there have to be. Every file is written beside its place and moved there in one step;
the bytes of a shard depend on its traces and its quarantined samples alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features

from laavit.files import write_bytes
from laavit.registry import UserError
from laavit.traces.schema import Row

SCHEMA = 2
HEADER = "header.json"


@dataclass(frozen=True)
class Record:
    """What stands beside a finished shard: how many traces and bytes, their hash, whose, and who was put aside."""

    count: int
    bytes: int
    sha256: str
    samples: str
    quarantined: dict[str, str]


@dataclass(frozen=True)
class Header:
    """The content of ``header.json``: how samples are cut into shards, how many and which, and what made the traces."""

    shard_size: int
    count: int
    samples: str
    content: dict[str, Any]

    @property
    def shards(self) -> int:
        """How many shards there have to be."""
        return math.ceil(self.count / self.shard_size)

    def as_json(self) -> dict[str, Any]:
        samples = {"count": self.count, "sha256": self.samples}
        return {"schema": SCHEMA, "shard_size": self.shard_size, "samples": samples, "header": self.content}


def complete_header(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header as JSON will give it back, with the storage settings filled in.

    Raises:
        UserError: it is not plain JSON data.
    """
    try:
        return json.loads(json.dumps({"gaze_top_k": None, "semantics_dtype": "float32", **header}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"the header of a trace store is plain JSON data: {error}") from error


def canonical(value: Any) -> bytes:
    """JSON with sorted keys: equal content, equal bytes."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass")


def ids_digest(ids: Iterable[str]) -> str:
    """SHA-256 of sample ids in order."""
    total = hashlib.sha256()
    for key in ids:
        total.update(json.dumps(key).encode() + b"\n")  # quoted: an id may hold any character
    return total.hexdigest()


def write_header(folder: Path, header: Header) -> None:
    """Write ``header.json``."""
    write_bytes(folder / HEADER, canonical(header.as_json()))


def read_header(folder: Path) -> Header | None:
    """The content of ``header.json``; ``None`` where the folder holds no store.

    Raises:
        UserError: the file is broken, or of another schema version.
    """
    path = folder / HEADER
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        version = content["schema"]
        if version != SCHEMA:
            old = ", written by an earlier version (extract it again)" if version == 1 else ""
            raise UserError(f"the trace store '{folder}' has schema {version}{old}; this version reads schema {SCHEMA}")
        samples = content["samples"]
        header = Header(int(content["shard_size"]), int(samples["count"]), str(samples["sha256"]), content["header"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is not the header of a trace store") from error
    if not isinstance(header.content, dict) or header.shard_size < 1 or header.count < 0:
        raise UserError(f"'{path}' is not the header of a trace store")
    return header


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard is; its record stands beside it as ``.json``."""
    return folder / f"shard-{index:05d}.arrow"


def shard_indices(folder: Path) -> list[int]:
    """The numbers of all shards that have a file, finished or not, in order."""
    stems = {file.stem for file in folder.glob("shard-*") if file.suffix in (".arrow", ".json")}
    numbers = [stem.removeprefix("shard-") for stem in stems]
    return sorted(int(number) for number in numbers if number.isdecimal())


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
    lengths = np.cumsum([0, *(len(value) for value in values)])
    if lengths[-1] > np.iinfo(np.int32).max:
        raise UserError("a shard holds more than 2^31 numbers of one column: choose a smaller extract.shard_size")
    inner = kind.value_type
    if pa.types.is_string(inner) or pa.types.is_boolean(inner):
        flat = pa.array([entry for value in values for entry in value], inner)
    else:
        number = inner.to_pandas_dtype()
        flat = pa.array(np.concatenate([np.zeros(0, number), *(np.asarray(value, number) for value in values)]), inner)
    return pa.ListArray.from_arrays(pa.array(lengths.astype(np.int32)), flat, type=kind)


def write_shard(
    folder: Path,
    index: int,
    rows: Sequence[Row],
    features: Features,
    samples: str,
    quarantined: Mapping[str, str] | None = None,
    sync: bool = True,
) -> Record:
    """Write a shard and then its record.

    Args:
        samples: ``ids_digest`` of its samples, those in ``quarantined`` (sample id -> reason) included.
        sync: flush to the disk; what a power cut leaves of a shard otherwise is found by its hash.
    """
    path, content = shard_path(folder, index), stream_bytes(rows, features)
    sha256 = hashlib.sha256(content).hexdigest()
    record = Record(len(rows), len(content), sha256, samples, dict(quarantined or {}))
    write_bytes(path, content, sync)
    write_bytes(path.with_suffix(".json"), canonical(asdict(record)), sync)
    return record


def copy_shard(source: Path, target: Path, index: int) -> None:
    """Copy a finished shard of one store to another, the record last."""
    for suffix in (".arrow", ".json"):
        write_bytes(
            shard_path(target, index).with_suffix(suffix), shard_path(source, index).with_suffix(suffix).read_bytes()
        )


def drop_shard(folder: Path, index: int) -> None:
    """Take a shard away, so that it is done again."""
    shard_path(folder, index).with_suffix(".json").unlink(missing_ok=True)
    shard_path(folder, index).unlink(missing_ok=True)


def read_record(folder: Path, index: int, verify: bool = True) -> Record | str:
    """A shard's record, or in words why it does not count: missing, unfinished, truncated, or (``verify``) changed."""
    path = shard_path(folder, index)
    if not path.is_file() and not path.with_suffix(".json").is_file():
        return "missing"
    try:
        content = json.loads(path.with_suffix(".json").read_bytes())
        aside = content["quarantined"]
        record = Record(
            int(content["count"]), int(content["bytes"]), str(content["sha256"]), str(content["samples"]), dict(aside)
        )
    except FileNotFoundError:
        return "unfinished: its record is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its record cannot be read ({type(error).__name__})"
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        return "its file is missing"
    if size != record.bytes:
        return f"{'truncated' if size < record.bytes else 'too long'}: {size} of {record.bytes} bytes"
    return "changed: its SHA-256 is another" if verify and file_sha256(path) != record.sha256 else record


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


class Shard:
    """One shard's columns, memory-mapped when first read; a pickled one is its path and opens anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_columns": None}

    def _open(self) -> dict[str, Any]:
        if self._columns is None:
            with pa.memory_map(str(self.path)) as source:
                table = pa.ipc.open_stream(source).read_all().combine_chunks()
            columns: dict[str, Any] = {}
            for field in table.schema:
                column = table.column(field.name)
                column = column.chunk(0) if column.num_chunks else pa.array([], field.type)
                columns[field.name] = column
                if pa.types.is_list(field.type):
                    inner = column.values
                    plain = pa.types.is_string(inner.type) or pa.types.is_boolean(inner.type)
                    numbers = inner if plain else inner.to_numpy(zero_copy_only=False)
                    columns[field.name] = (column.offsets.to_numpy(), numbers)
            self._columns = columns
        return self._columns

    def ids(self) -> list[str]:
        """The samples' ids, in order."""
        return self._open()["sample_id"].to_pylist()

    def row(self, place: int) -> Row:
        """One row: numbers as NumPy views of the map (copy them), the rest as Python values."""
        row: Row = {}
        for name, column in self._open().items():
            if isinstance(column, tuple):
                offsets, values = column
                part = values[offsets[place] : offsets[place + 1]]
                row[name] = part.tolist() if isinstance(part, pa.Array) or name.startswith("score") else part
            else:
                row[name] = column[place].as_py()
        return row


def read_rows(path: Path) -> list[Row]:
    """Every row of a file that ``stream_bytes`` made."""
    shard = Shard(path)
    return [shard.row(place) for place in range(len(shard.ids()))]


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
