"""Files that are there whole or not at all: write beside, flush to the disk, rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laavit.registry import UserError

TEMPORARY = ".tmp-"


def write_bytes(path: Path, content: bytes, sync: bool = True) -> None:
    """Write a file atomically, making its folder: a reader sees the old file or the new one, never half.

    Args:
        sync: flush to the disk before the file gets its name (against a power cut); False for many small files that can
            be made again.

    Raises:
        OSError: the disk is full or not writable; the former file, if any, is untouched and nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f"{TEMPORARY}{os.getpid()}-{path.name}"
    try:
        with beside.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8; errors as ``write_bytes``."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON, atomically. NaN and infinity are refused (they are no JSON)."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or {} where there is none.

    Raises:
        UserError: the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"'{path}' is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds a {type(content).__name__}; a JSON object is expected")
    return content


def sync_entry(path: Path) -> None:
    """Flush a file, or a folder's own list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file below ``folder``, and the folders themselves, to the disk (against a power cut)."""
    for path in [*folder.rglob("*"), folder]:
        sync_entry(path)


def remove_tree(folder: Path) -> None:
    """Delete a folder so that no half-deleted one is ever seen under its name."""
    if not folder.exists():
        return
    doomed = folder.with_name(f"{TEMPORARY}{os.getpid()}-gone-{folder.name}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def link_to(target: Path, link: Path) -> None:
    """Make ``link`` a symbolic link to its sibling ``target``, atomically, whatever it named before."""
    beside = link.with_name(f"{TEMPORARY}{os.getpid()}-{link.name}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target.name)
    os.replace(beside, link)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written in ``folder``."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
