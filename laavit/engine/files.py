"""Files that are there whole or not at all: write beside, flush to the disk, rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        OSError: the disk is full or not writable; the former file, if any, is untouched and nothing is left beside it.
    """
    beside = path.parent / f"{TEMPORARY}{os.getpid()}-{path.name}"
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON, atomically. NaN and infinity are refused (they are no JSON)."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync_tree(folder: Path) -> None:
    """Flush every file below ``folder``, and the folders themselves, to the disk (against a power cut)."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_tree(folder: Path) -> None:
    """Delete a folder so that no half-deleted one is ever seen under its name."""
    if not folder.exists():
        return
    doomed = folder.with_name(f"{TEMPORARY}{os.getpid()}-gone-{folder.name}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written in ``folder``."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
