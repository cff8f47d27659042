"""The columns of a stored trace (schema 2): a ``Trace`` as a row, and back.

Bytes of one sample, for semantics D wide in ``b`` bytes a number (4, or 2 as float16 or bfloat16), T image tiles,
N image tokens, Top-k maps (``e = min(k, N)`` entries of 8 bytes; full maps: ``e = N`` entries of 4), M rows of
semantics (1 where they are pooled) and P steps:

    b M D + 8 e (P + 1)  [full maps: 4 N (P + 1)]  + 4 M where not pooled + 12 T + 32 T where tiles are parts of images
    + 76 + 8 P + the texts (id, answer, blind answer, and each step's words and group)
    + 12 + A (4 + 8 K) for the K log-probabilities at each of A answer tokens, where they are kept

and, once a shard, about 5 kB of Arrow's framing. ``TraceStore.bytes_per_sample`` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Features, List, Value
from torch import Tensor

from laavit.registry import UserError, nearest
from laavit.structures import AnswerLogits, Step, Tile, Trace
from laavit.traces.gaze import top_k_indices

#: what semantics are stored as: the settings' name -> the column's type; Arrow knows no bfloat16, so its bits are kept
SEMANTICS_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
WHOLE = (0.0, 0.0, 1.0, 1.0)

Row = dict[str, Any]

VERDICT_FEATURES = Features({"sample_id": Value("string"), "verdict": Value("bool"), "score": Value("float64")})


def storage(header: Mapping[str, Any]) -> tuple[int | None, str, int]:
    """What a store's header says of storage: ``gaze_top_k``, ``semantics_dtype`` and ``settings.logits``, checked.

    Raises:
        UserError: one of them is not one of those allowed.
    """
    k, dtype, logits = header["gaze_top_k"], header["semantics_dtype"], (header.get("settings") or {}).get("logits", 0)
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise UserError(f"gaze_top_k is a whole number of at least 1 or none, got {k!r}")
    if dtype not in SEMANTICS_DTYPES:
        raise UserError(f"semantics_dtype is {dtype!r}; {nearest(str(dtype), SEMANTICS_DTYPES)}")
    if isinstance(logits, bool) or not isinstance(logits, int) or logits < 0:
        raise UserError(f"settings.logits is a whole number of at least 0, got {logits!r}")
    return k, dtype, logits


def trace_features(semantics_dtype: str, logits: int = 0) -> Features:
    """The columns of a shard. Index columns are empty where full maps, or pooled semantics, are stored.

    Args:
        logits: answer logits a token; without any there are no columns for them.
    """
    numbers = List(Value("int32"))
    kept = {"answer_tokens": numbers, "logit_ids": numbers, "logprobs": List(Value("float32"))}
    return Features(
        {
            "sample_id": Value("string"),
            "answer": Value("string"),
            "blind_answer": Value("string"),
            "mass": Value("float64"),
            "tiles": List(Value("int32")),  # height, width, image of each
            "regions": List(Value("float64")),  # x1, y1, x2, y2 of each; empty where every tile is a whole image
            "gaze_indices": List(Value("int32")),
            "gaze_values": List(Value("float32")),
            "semantics": List(Value(SEMANTICS_DTYPES[semantics_dtype])),
            "semantic_tokens": List(Value("int32")),
            "step_texts": List(Value("string")),
            "step_groups": List(Value("string")),
            "step_indices": List(Value("int32")),  # as many a step as gaze_indices has, one step after another
            "step_values": List(Value("float32")),
            "verdict_names": List(Value("string")),
            "verdict_values": List(Value("bool")),
            "score_names": List(Value("string")),
            "score_values": List(Value("float64")),
        }
        | (kept if logits else {})
    )


def encode(trace: Trace, gaze_top_k: int | None, semantics_dtype: str, logits: int = 0) -> Row:
    """A trace as the row that is stored.

    Raises:
        UserError: the trace does not fit itself (maps against tiles, semantics against their tokens) or the number
            of answer logits, or has figures that are not finite.
    """
    name = f"the trace of sample '{trace.sample_id}'"
    if not trace.sample_id:
        raise UserError("a trace has an empty sample id")
    if not math.isfinite(trace.mass):
        raise UserError(f"{name} has a mass of {trace.mass}")
    indices, values = _map(trace.gaze, trace.tiles, gaze_top_k, f"{name} has a gaze")
    steps = [_map(step.gaze, trace.tiles, gaze_top_k, f"{name} has a step's gaze") for step in trace.steps]
    whole = all(tile.region == WHOLE for tile in trace.tiles)
    tokens = trace.semantic_tokens
    return {
        "sample_id": trace.sample_id,
        "answer": trace.answer,
        "blind_answer": trace.blind_answer,
        "mass": float(trace.mass),
        "tiles": np.asarray([(t.height, t.width, t.image) for t in trace.tiles], dtype=np.int32).reshape(-1),
        "regions": np.asarray([] if whole else [t.region for t in trace.tiles], dtype=np.float64).reshape(-1),
        "gaze_indices": indices,
        "gaze_values": values,
        "semantics": _semantics(trace, semantics_dtype, name),
        "semantic_tokens": np.zeros(0, np.int32) if tokens is None else tokens.detach().cpu().to(torch.int32).numpy(),
        "step_texts": [step.text for step in trace.steps],
        "step_groups": [step.group for step in trace.steps],
        "step_indices": np.concatenate([np.zeros(0, np.int32), *(step[0] for step in steps)]),
        "step_values": np.concatenate([np.zeros(0, np.float32), *(step[1] for step in steps)]),
        "verdict_names": [str(key) for key in trace.verdicts],
        "verdict_values": [bool(value) for value in trace.verdicts.values()],
        "score_names": [str(key) for key in trace.scores],
        "score_values": [float(value) for value in trace.scores.values()],
        **_logits(trace.logits, logits, name),
    }


def _map(gaze: Tensor, tiles: Sequence[Tile], k: int | None, what: str) -> tuple[np.ndarray, np.ndarray]:
    """A map [N] as it is stored: the indices (none of a full map) and the values."""
    tokens = sum(tile.cells for tile in tiles)
    if gaze.ndim != 1 or gaze.shape[0] != tokens:
        raise UserError(f"{what} of shape {tuple(gaze.shape)} for tiles {tuple(tiles)} ({tokens} tokens)")
    gaze = gaze.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(gaze).all()) or bool((gaze < 0).any()):
        raise UserError(f"{what} map with negative or non-finite entries")
    if k is None:
        return np.zeros(0, np.int32), gaze.numpy().copy()
    kept = top_k_indices(gaze, k)
    return kept.to(torch.int32).numpy(), gaze[kept].numpy()


def _semantics(trace: Trace, dtype: str, name: str) -> np.ndarray:
    given, tokens = trace.semantics, trace.semantic_tokens
    if tokens is None:
        if given.ndim != 1 or given.shape[0] == 0:
            raise UserError(f"{name} has semantics of shape {tuple(given.shape)}; allowed: one vector [D]")
    elif given.ndim != 2 or 0 in given.shape or tokens.shape != given.shape[:1]:
        raise UserError(
            f"{name} has semantics of shape {tuple(given.shape)} for semantic tokens of shape {tuple(tokens.shape)}; "
            "allowed: [M, D] for [M]"
        )
    elif int(tokens.min()) < 0 or int(tokens.max()) >= len(trace.gaze):
        raise UserError(f"{name} has semantics of token {int(tokens.max())}, and {len(trace.gaze)} image tokens")
    values = given.detach().to("cpu", getattr(torch, dtype)).flatten()
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"{name} has semantics that are not finite as {dtype}; allowed: semantics_dtype float32")
    return (values.view(torch.uint16) if dtype == "bfloat16" else values).numpy().copy()


def _logits(given: AnswerLogits | None, k: int, name: str) -> Row:
    """The columns of answer logits, none where k is 0."""
    if given is None and not k:
        return {}
    if given is None or not k:
        raise UserError(f"{name} has {'no' if given is None else 'some'} answer logits; the store keeps {k} a token")
    if given.ids.shape != (len(given.tokens), k) or given.logprobs.shape != given.ids.shape:
        raise UserError(
            f"{name} has answer logits of shape {tuple(given.logprobs.shape)} for ids {tuple(given.ids.shape)} and "
            f"{len(given.tokens)} answer tokens; the store keeps {k} a token"
        )
    values = given.logprobs.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"{name} has answer logits that are not finite")
    return {
        "answer_tokens": given.tokens.cpu().to(torch.int32).numpy(),
        "logit_ids": given.ids.cpu().to(torch.int32).flatten().numpy(),
        "logprobs": values.flatten().numpy(),
    }


def decode(row: Mapping[str, Any], sparse: bool, semantics_dtype: str) -> Trace:
    """A stored row as a trace with dense maps and float32 semantics; tensors are copies, free of the memory map."""
    sides = row["tiles"].reshape(-1, 3).tolist()
    regions = row["regions"].reshape(-1, 4).tolist() or [WHOLE] * len(sides)
    tiles = tuple(Tile(h, w, image, tuple(region)) for (h, w, image), region in zip(sides, regions, strict=True))
    cells = sum(tile.cells for tile in tiles)
    semantics = torch.from_numpy(row["semantics"].copy())
    if semantics_dtype == "bfloat16":
        semantics = semantics.view(torch.bfloat16)
    tokens = torch.from_numpy(row["semantic_tokens"].astype(np.int64))
    maps = [_dense(row["gaze_indices"], row["gaze_values"], cells, sparse)]
    count = len(row["step_texts"])
    step_indices = row["step_indices"].reshape(count, -1) if sparse and count else [None] * count
    step_values = row["step_values"].reshape(count, -1) if count else []
    maps += [_dense(i, v, cells, sparse) for i, v in zip(step_indices, step_values, strict=True)]
    return Trace(
        sample_id=row["sample_id"],
        answer=row["answer"],
        tiles=tiles,
        gaze=maps[0],
        semantics=semantics.float().reshape(len(tokens), -1) if len(tokens) else semantics.float(),
        mass=row["mass"],
        semantic_tokens=tokens if len(tokens) else None,
        steps=tuple(map(Step, row["step_texts"], row["step_groups"], maps[1:])),
        blind_answer=row["blind_answer"],
        logits=_read_logits(row) if "answer_tokens" in row else None,
        verdicts=dict(zip(row["verdict_names"], row["verdict_values"], strict=True)),
        scores=dict(zip(row["score_names"], row["score_values"], strict=True)),
    )


def _read_logits(row: Mapping[str, Any]) -> AnswerLogits:
    tokens, ids = (torch.from_numpy(row[name].astype(np.int64)) for name in ("answer_tokens", "logit_ids"))
    logprobs = torch.from_numpy(row["logprobs"].copy())
    return AnswerLogits(tokens, ids.reshape(len(tokens), -1), logprobs.reshape(len(tokens), -1))


def _dense(indices: Any, values: np.ndarray, cells: int, sparse: bool) -> Tensor:
    if not sparse:
        return torch.from_numpy(values.copy())
    dense = torch.zeros(cells)
    return dense.index_copy_(0, torch.from_numpy(indices.astype(np.int64)), torch.from_numpy(values.copy()))
