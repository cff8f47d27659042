"""``lmms-eval`` in a process of its own, which sees the model ``laavit`` whether or not the package is installed."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmms_eval.models import MODEL_REGISTRY_V2

from laavit.paths import project_data


def entry_point(folder: Path) -> dict[str, str]:
    """The environment in which lmms-eval sees the model: as installed, or with the package's metadata written here."""
    if "laavit" in MODEL_REGISTRY_V2.list_canonical_model_ids():
        return {}
    assert not list(importlib.metadata.entry_points(group="lmms_eval.models", name="laavit"))
    metadata = folder / "laavit_under_test-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: laavit-under-test\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[lmms_eval.models]\nlaavit = laavit.evaluation:manifest\n")
    root = str(Path(__file__).resolve().parents[1])
    return {"PYTHONPATH": os.pathsep.join([str(folder), root])}


def lmms_eval(
    model: Path, tasks: Sequence[str], out: Path, *more: str, cwd: Path, environment: Mapping[str, str] | None = None
) -> Path:
    """Run the command over ``tasks``; returns the file with its results."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "laavit", "--model_args", f"pretrained={model}"]
    command += ["--tasks", ",".join(tasks), "--include_path", str(project_data("eval") / "tasks")]
    command += ["--output_path", str(out / "out"), *more]
    around = {**os.environ, **entry_point(out / "site"), **(environment or {})}
    run = subprocess.run(command, env=around, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    [file] = (out / "out").rglob("*_results.json")
    return file
