"""Ids of samples: the shortest spelling under which all of a file differ, and what to do with doubles."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

#: What makes two records of one id the same record; its place in the file does not.
CONTENT = ["images", "question", "answer", "corners", "places", "unit", "meta"]
SPELLINGS = (["key"], ["source", "key"], ["source", "split", "key"])
BLOCK = 4096


class Identities(NamedTuple):
    """ids: text, one a sample. rows: int64, the record of each. doubled: (place, id, reason) of the records that go."""

    ids: pa.Array
    rows: pa.Array
    doubled: list[tuple[str, str, str]]


def identify(records: pa.Table, numbered: bool = False) -> Identities:
    """Ids of all records that stay.

    An id is the record's key; where keys are not unique in the file, every id is ``source-key``, and where those are
    not either, ``source-split-key``. Of records that share even that, one with the same content is a duplicate and
    goes; one with other content goes too, or gets a number (``key~2``) where the format does not promise unique ids.
    """
    spelled = _spelled(records, SPELLINGS[-1])
    stay, numbers, doubled = _doubles(records, spelled, numbered)
    names = records.select(SPELLINGS[-1]).take(pa.array(stay)) if doubled else records
    for parts in SPELLINGS:
        ids = _spelled(names, parts)
        if numbers.max(initial=1) > 1:
            ids = pc.binary_join_element_wise(ids, pa.array([f"~{n}" if n > 1 else "" for n in numbers.tolist()]), "")
        if pc.count_distinct(ids).as_py() == len(ids):
            break
    return Identities(ids, pa.array(stay), doubled)


def _spelled(records: pa.Table, parts: list[str]) -> pa.Array:
    columns = [records[part].combine_chunks() for part in parts]
    # a set without sources says nothing by an empty one
    columns = [column for column in columns[:-1] if pc.max(pc.utf8_length(column)).as_py()] + columns[-1:]
    return pc.binary_join_element_wise(*columns, "-") if len(columns) > 1 else columns[0]


def _doubles(
    records: pa.Table, spelled: pa.Array, numbered: bool
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str, str]]]:
    """Rows that stay, in order; each one's number among those of its spelling, from 1; and what goes, with reasons."""
    codes = spelled.dictionary_encode().indices.to_numpy()
    keep, numbers = np.ones(len(codes), bool), np.ones(len(codes), np.int64)
    shared = np.flatnonzero(np.bincount(codes)[codes] > 1) if len(codes) else codes
    seen: dict[int, dict[bytes, str]] = {}  # spelling -> content -> the place it was first seen at
    doubled = []
    for row, where, key, content in _contents(records, shared):
        known = seen.setdefault(int(codes[row]), {})
        if content not in known and (numbered or not known):
            known[content] = where
            numbers[row] = len(known)
            continue
        keep[row] = False
        if content in known:
            reason = f"duplicate: {known[content]} is the same"
        else:
            reason = f"id: {next(iter(known.values()))} is another record with the id '{spelled[row]}'"
        doubled.append((where, key, reason))
    return np.flatnonzero(keep), numbers[keep], doubled


def _contents(records: pa.Table, rows: np.ndarray) -> Iterator[tuple[int, str, str, bytes]]:
    """(row, place, key, hash of the content) of some rows, a block at a time."""
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        found = records.select(["where", "key", *CONTENT]).take(pa.array(block)).to_pylist()
        for row, each in zip(block.tolist(), found, strict=True):
            text = repr([each[name] for name in CONTENT])
            yield row, each["where"], each["key"], hashlib.blake2b(text.encode(), digest_size=16).digest()
