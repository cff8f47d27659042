"""What a run was made with, so that it can be repeated: versions, machine, commit, seeds, hashes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "laavit",
    "torch",
    "torchvision",
    "transformers",
    "mmengine-lite",
    "mmengine",
    "safetensors",
    "datasets",
    "numpy",
    "timm",
    "open_clip_torch",
    "lmms-eval",
    "jsonargparse",
    "accelerate",
)


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it, or None outside a checkout or without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's checkout: only the one that tracks this very file counts.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def describe(device: torch.device, world_size: int, seed: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The environment of a run as plain data.

    Args:
        extra: what the caller knows, for example hashes of data, traces and weights; its keys stand beside ours.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": str(device),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "threads": torch.get_num_threads(),
        "processes": world_size,
        "seed": seed,
        "git": git_state(Path(__file__).resolve().parents[1]),
        "command": sys.argv,
        **extra,
    }
