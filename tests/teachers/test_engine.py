"""The extraction into a store: what it holds, and what an interruption leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from laavit.registry import UserError
from laavit.structures import Sample, Tile, Trace
from laavit.teachers import ExtractSettings, HFTeacher, extract, recording
from laavit.traces.store import TraceStore, TraceWriter

GOLD = ExtractSettings(answer="gold", batch_size=3, shard_size=3)


def traces_of(teacher: HFTeacher, samples: list[Sample]) -> list[Trace]:
    extractor = teacher.extractor(GOLD)
    return extractor([extractor.preparer(sample) for sample in samples])


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name[0] != "."
    }


def test_the_store_holds_what_the_extractor_saw(tiny_folder: Path, samples: list[Sample], tmp_path: Path) -> None:
    teacher = HFTeacher(str(tiny_folder))
    store = TraceStore(extract(teacher, samples, GOLD, tmp_path / "store", {"name": "test"}))
    for trace, expected in zip(store, traces_of(teacher, samples), strict=True):
        assert torch.equal(trace.gaze, expected.gaze) and torch.equal(trace.semantics, expected.semantics)
    assert store.header["width"] == 32 and store.header["teacher"] == str(tiny_folder)
    assert store.header["weights_sha256"] == teacher.backbone.weights_digest()
    assert store.header["settings"]["rows"] == ["question", "header", "answer"]


def test_a_sparse_store_keeps_the_strongest_tokens(tiny_folder: Path, samples: list[Sample], tmp_path: Path) -> None:
    settings = replace(GOLD, gaze_top_k=3)
    store = TraceStore(extract(HFTeacher(str(tiny_folder)), samples, settings, tmp_path, {}))
    assert store.header["gaze_top_k"] == 3
    assert [(trace.gaze > 0).sum().item() for trace in store] == [3, 3, 3]
    with pytest.raises(UserError, match=r"extract\.gaze_top_k: at least 1, got 0"):
        ExtractSettings(gaze_top_k=0)


def test_an_error_inside_a_batch_leaves_the_resumed_bits_equal(
    tiny_folder: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace that cannot be stored stops the run between batches: nothing of its batch is kept."""
    many = [replace(sample, id=f"{sample.id}{n}") for n in range(3) for sample in samples]
    teacher = HFTeacher(str(tiny_folder))
    settings = replace(GOLD, batch_size=2, shard_size=4, answer="teacher", max_new_tokens=3)
    extract(teacher, many, settings, tmp_path / "whole", {})

    genuine = recording.select
    calls: list[int] = []

    def spoilt(*given: Any) -> Any:
        calls.append(1)
        pooled, tokens = genuine(*given)
        return (pooled * float("nan") if len(calls) == 6 else pooled), tokens  # the second of the third batch

    monkeypatch.setattr(recording, "select", spoilt)
    with pytest.raises(UserError, match="not finite"):
        extract(teacher, many, settings, tmp_path / "stopped", {})
    assert len(TraceStore(tmp_path / "stopped")) == 4
    monkeypatch.undo()
    extract(teacher, many, settings, tmp_path / "stopped", {})
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_a_batch_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    def trace(name: str, value: float = 1.0) -> Trace:
        return Trace(name, "x", (Tile(1, 2),), torch.tensor([0.1, value]), torch.ones(3), 0.1)

    with TraceWriter(tmp_path, {}, 4) as writer:
        writer.extend([trace("a"), trace("b")])
        for bad in ([trace("c"), trace("d", float("nan"))], [trace("c"), trace("c")], [trace("c"), trace("a")]):
            with pytest.raises(UserError):
                writer.extend(bad)
        assert writer.done == {"a", "b"}
    assert TraceStore(tmp_path).ids == ("a", "b")


def test_other_settings_or_data_than_the_store_was_begun_with(
    tiny_folder: Path, samples: list[Sample], tmp_path: Path
) -> None:
    teacher = HFTeacher(str(tiny_folder))
    extract(teacher, samples, GOLD, tmp_path, {"annotations_sha256": "1"})
    with pytest.raises(UserError, match=r"begun with other settings.*top_k"):
        extract(teacher, samples, replace(GOLD, top_k=4), tmp_path, {"annotations_sha256": "1"})
    with pytest.raises(UserError, match=r"begun with other settings.*annotations_sha256"):
        extract(teacher, samples, GOLD, tmp_path, {"annotations_sha256": "2"})
    json.loads((tmp_path / "header.json").read_text())
