"""Batches that a step could not be made with, kept on disk: tensors as safetensors, all else as JSON, no pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from laavit import structures
from laavit.files import write_json
from laavit.registry import UserError

FOLDER = "bad_batches"


@dataclass(frozen=True)
class BadBatch:
    """What one process's share of a step was.

    Args:
        facts: plain data: step, what was not finite, the samples' ids.
        batches: the micro-batches, arguments of ``forward``.
        random: states of torch's generators when the step began, ``torch`` and on a GPU ``cuda``.
    """

    facts: Mapping[str, Any]
    batches: Sequence[Any]
    random: Mapping[str, Tensor]


def step_folder(work_dir: Path, step: int) -> Path:
    """``RUN/bad_batches/step_000123``; the step as the gate's schedule counts it, from 0."""
    return work_dir / FOLDER / f"step_{step:06d}"


def write_bad_batch(folder: Path, rank: int, bad: BadBatch) -> None:
    """Write ``rank_N.safetensors`` and ``rank_N.json``.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    tensors = {f"random.{name}": state.cpu() for name, state in bad.random.items()}
    content = {"facts": dict(bad.facts), "batches": _plain(list(bad.batches), "batches", tensors)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"rank_{rank}.safetensors")
    write_json(folder / f"rank_{rank}.json", content)


def read_bad_batches(folder: Path) -> dict[int, BadBatch]:
    """What the processes kept of a step, by their number.

    Raises:
        UserError: the folder holds none, or a file is damaged.
    """
    found = {}
    for file in sorted(folder.glob("rank_*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            tensors = load_file(file.with_suffix(".safetensors"))
            batches = _restored(content["batches"], tensors)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(f"the kept batch '{file}' cannot be read: {error}") from None
        random = {key.removeprefix("random."): value for key, value in tensors.items() if key.startswith("random.")}
        found[int(file.stem.removeprefix("rank_"))] = BadBatch(content["facts"], batches, random)
    if not found:
        raise UserError(f"'{folder}' holds no kept batch; runs write them to RUN/{FOLDER}/step_<number>")
    return found


def _plain(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors go to ``tensors`` under their path. What is neither is kept as its text."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone().contiguous()  # clones: safetensors refuses shared memory
        return {"tensor": path}
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Path):
        return {"path": str(value)}
    if is_dataclass(value):
        parts = {f.name: _plain(getattr(value, f.name), f"{path}.{f.name}", tensors) for f in fields(value)}
        return {"type": type(value).__name__, "fields": parts}
    if isinstance(value, Mapping):
        return {"mapping": {str(key): _plain(item, f"{path}.{key}", tensors) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_plain(item, f"{path}.{place}", tensors) for place, item in enumerate(value)]}
    return {"text": repr(value)}


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse; a dataclass that is none of ``laavit.structures`` becomes a namespace."""
    if not isinstance(value, dict):
        return value
    if "fields" in value:
        parts = {name: _restored(item, tensors) for name, item in value["fields"].items()}
        kind = getattr(structures, value["type"], None)
        return kind(**parts) if isinstance(kind, type) and is_dataclass(kind) else SimpleNamespace(**parts)
    [(kind, content)] = value.items()
    if kind == "mapping":
        return {key: _restored(item, tensors) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [_restored(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    if kind == "tensor":
        return tensors[content]
    return {"float": float, "path": Path, "text": str}[kind](content)
