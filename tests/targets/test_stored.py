"""From a store to a training step: what was extracted with other settings, or by another family, is what is learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from families import tiny

from laavit.cli import run
from laavit.traces.store import TraceStore, TraceWriter


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


def losses(log: list[dict[str, float]], *names: str) -> torch.Tensor:
    """The named figures of every logged step, which has them all: [steps, names]."""
    return torch.tensor([[entry[name] for name in names] for entry in log if "ntp" in entry])


def test_controls_and_answer_maps_by_name(own_project: Path) -> None:
    flags = ["--extract.steps", "token", "--targets.trajectory", "trajectory_answer"]
    flags += ["--targets.concept", "concept_wrong_image", "--targets.random", "trajectory_random"]
    flags += ["--targets.shuffled", "trajectory_shuffled"]
    found = losses(trained(own_project, flags), "trajectory", "concept", "random", "shuffled")
    assert len(found) and torch.isfinite(found).all() and (found > 0).all()


def test_boxes_and_regions_need_no_traces(own_project: Path) -> None:
    """Without a store, without an extraction; the same recipe with a target of the teacher's says what is missing."""
    folder = own_project.parent / "run"
    flags = ["--traces.path", "null", "--filters", "null", "--targets.concept", "null", "--train.steps", "2"]
    without = [*flags, "--targets.trajectory", "box", "--targets.region", "region", "--work-dir", str(folder)]
    assert run("train", [str(own_project), *without]) == 0
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    found = losses(log, "trajectory", "region")
    assert len(found) and torch.isfinite(found).all() and (found > 0).all()


def test_semantics_from_a_store_beside_the_run_s(own_project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gaze of one extraction, semantics of another, each checked against its own header; both are noted down."""
    other = own_project.parent / "rows"
    assert run("extract", [str(own_project), "--traces.path", str(other), "--extract.semantics", "top_k_rows"]) == 0
    flags = ["--targets.concept", "concept_ordered", "--targets.concept.store", str(other)]
    found = losses(trained(own_project, flags), "concept", "trajectory")
    assert len(found) and torch.isfinite(found).all() and (found > 0).all()
    card = json.loads((own_project.parent / "run" / "environment.json").read_text(encoding="utf-8"))
    noted, store = json.dumps(card), TraceStore(other)
    assert store.digest() in noted and TraceStore(own_project.parent / "traces").digest() in noted

    stale = own_project.parent / "stale"
    with TraceWriter(stale, {**store.header, "data": {"annotations_sha256": "0" * 64}}) as writer:
        writer.extend(store)
    words = [str(own_project), *flags, "--targets.concept.store", str(stale), "--work-dir", str(stale / "run")]
    assert run("train", words) == 2
    assert "stale' does not fit the recipe: 'data.annotations_sha256' is '000" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["internvl", "smolvlm"])
def test_a_teacher_that_cuts_images_up(
    family: str, own_project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tiny(family, tmp_path_factory.mktemp(family))
    log = trained(own_project, ["--teacher.path", str(folder)])
    assert any(len(trace.tiles) > 1 for trace in TraceStore(own_project.parent / "traces"))
    values = torch.tensor([[entry["concept"], entry["trajectory"]] for entry in log if "trajectory" in entry])
    assert len(values) and torch.isfinite(values).all() and (values > 0).all()
