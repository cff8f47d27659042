"""Several stores into one: the parts of an extraction that were written to folders of their own, or any of one header.

Parts of one plan (equal headers, sample counts included) are put together shard by shard: the result has the bytes of a
single run. Stores of other samples with the same settings are put one after another, and a sample that is in several
of them is kept once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from laavit.registry import UserError
from laavit.structures import Trace
from laavit.traces import shards
from laavit.traces.diff import header_differences
from laavit.traces.export import carry_verdicts, own
from laavit.traces.schema import encode, storage, trace_features
from laavit.traces.shards import Header, Record
from laavit.traces.store import TraceStore, TraceWriter

logger = logging.getLogger(__name__)


class Merged(NamedTuple):
    """What a merge did: traces in the result, duplicates that were dropped, shards that no part holds."""

    traces: int
    dropped: int
    missing: tuple[int, ...]


def merge(out: Path, parts: Sequence[Path], partial: bool = False) -> Merged:
    """Merge stores into a new one.

    Args:
        out: an empty or new folder. parts: two stores or more. partial: parts of one plan may lack shards; the
            extraction can go on in the result.

    Raises:
        UserError: headers differ (in what, is named), a sample or shard differs between parts, shards are missing, or
            ``out`` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"the place of the merged store, '{out}', is not an empty folder")
    headers = [_header(part) for part in parts]
    for part, header in zip(parts[1:], headers[1:], strict=True):
        found = {"shard_size": header.shard_size, **header.content}
        wanted = {"shard_size": headers[0].shard_size, **headers[0].content}
        if names := header_differences(wanted, found):
            raise UserError(f"'{parts[0]}' and '{part}' were made with other settings: {'; '.join(names)}")
    if all((header.count, header.samples) == (headers[0].count, headers[0].samples) for header in headers):
        return _by_shards(out, parts, headers[0], partial)
    return _by_samples(out, parts, headers[0])


def _header(part: Path) -> Header:
    header = shards.read_header(part)
    if header is None:
        raise UserError(f"there is no trace store at '{part}'")
    return header


def _by_shards(out: Path, parts: Sequence[Path], header: Header, partial: bool) -> Merged:
    """Copy each shard from a part that has it; all that have it must have the same."""
    chosen: dict[int, Path] = {}
    dropped, missing = 0, []
    for index in range(header.shards):
        name = shards.shard_path(out, index).name
        found: dict[Path, Record] = {}
        for part in parts:
            record = shards.read_record(part, index)
            if isinstance(record, Record):
                found[part] = record
            elif record != "missing":
                logger.warning("%s of '%s' is left out: %s", name, part, record)
        if not found:
            missing.append(index)
            continue
        (chosen[index], first), *others = found.items()
        for part, record in others:
            if record != first:
                raise UserError(f"{name} is another one in '{chosen[index]}' and in '{part}'")
            dropped += record.count
    if missing and not partial:
        raise UserError(
            f"no part holds {len(missing)} of the {header.shards} shards ({shards.shard_path(out, missing[0]).name} "
            "first): extract them, or merge what there is with --partial"
        )
    for index, part in chosen.items():
        shards.copy_shard(part, out, index)
    shards.write_header(out, header)
    store = TraceStore(out, verify=False, complete=not partial)
    if not missing:
        carry_verdicts(store, [TraceStore(part, verify=False, complete=False) for part in parts])
    return Merged(len(store), dropped, tuple(missing))


def _by_samples(out: Path, parts: Sequence[Path], header: Header) -> Merged:
    """Append every store's traces; a sample's trace must be the same wherever it is, and beats being put aside."""
    stores = [TraceStore(part) for part in parts]
    columns = [set(store.verdicts()) for store in stores]
    storing = storage(header.content)
    traced = {key for store in stores for key in store.ids}
    dropped, aside = 0, set[str]()
    first: dict[str, int] = {}
    with TraceWriter(out, header.content, header.shard_size) as writer:
        for number, store in enumerate(stores):
            for key in store.ids:
                trace = own(store.get(key), columns[number])
                known = first.setdefault(key, number)
                if known == number:
                    writer.append(trace)
                    continue
                other = own(stores[known].get(key), columns[known])
                if _bytes(other, *storing) != _bytes(trace, *storing):
                    raise UserError(f"the trace of '{key}' is another one in '{parts[known]}' and in '{store.path}'")
                dropped += 1
            for key, reason in store.quarantined.items():
                if key not in traced and key not in aside:
                    aside.add(key)
                    writer.quarantine(key, reason)
    merged = TraceStore(out, verify=False)
    carry_verdicts(merged, stores)
    return Merged(len(merged), dropped, ())


def _bytes(trace: Trace, top_k: int | None, dtype: str, logits: int) -> bytes:
    return shards.stream_bytes([encode(trace, top_k, dtype, logits)], trace_features(dtype, logits))
