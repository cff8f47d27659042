"""From a store to a training step: what was extracted with other settings, or by another family, is what is learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from families import tiny

from laavit.cli import run
from laavit.traces.store import TraceStore


def trained(recipe: Path, flags: Sequence[str]) -> list[dict[str, float]]:
    """Extract, then train two steps; the log's entries."""
    folder = recipe.parent / "run"
    assert run("extract", [str(recipe), *flags]) == 0
    assert run("train", [str(recipe), *flags, "--train.steps", "2", "--work-dir", str(folder)]) == 0
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_steps_and_rows_are_learned(own_project: Path) -> None:
    flags = ["--extract.steps", "token", "--extract.semantics", "full", "--extract.normalisation", "minmax"]
    flags += ["--filters.alignment.any_scale", "true", "--targets.trajectory", "trajectory_steps"]
    log = trained(own_project, flags)
    store = TraceStore(own_project.parent / "traces")
    assert all(trace.steps and trace.semantics.ndim == 2 for trace in store)
    values = torch.tensor([[entry["concept"], entry["trajectory"]] for entry in log if "trajectory" in entry])
    assert len(values) and torch.isfinite(values).all() and (values > 0).all()


@pytest.mark.parametrize("family", ["internvl", "smolvlm"])
def test_a_teacher_that_cuts_images_up(
    family: str, own_project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tiny(family, tmp_path_factory.mktemp(family))
    log = trained(own_project, ["--teacher.path", str(folder)])
    assert any(len(trace.tiles) > 1 for trace in TraceStore(own_project.parent / "traces"))
    values = torch.tensor([[entry["concept"], entry["trajectory"]] for entry in log if "trajectory" in entry])
    assert len(values) and torch.isfinite(values).all() and (values > 0).all()
