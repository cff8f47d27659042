"""Samples beside their traces: what is missing stops before the first step, and what is read is what was stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from laavit.backbones import PromptSettings
from laavit.backbones.vision_cache import VisionCache
from laavit.data.aligned import AlignedDataset, Collate, select
from laavit.registry import UserError
from laavit.structures import Role, Sample
from laavit.targets import TrajectoryTarget
from laavit.traces.store import TraceStore, TraceWriter

PROMPT = PromptSettings(system="You are a helpful assistant.")


@pytest.fixture(scope="module")
def store(lab: Any, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> TraceStore:
    folder = tmp_path_factory.mktemp("store")
    with TraceWriter(folder, {"width": lab.width}) as writer:
        writer.extend([lab.trace(sample) for sample in samples])
    found = TraceStore(folder)
    found.write_verdicts("correctness", {"a": True, "b": False, "c": True}, {"a": 1.0, "b": 0.0, "c": 1.0})
    found.write_verdicts("alignment", {"a": True, "b": True, "c": False}, {"a": 0.5, "b": 0.5, "c": 0.1})
    return found


@pytest.fixture(scope="module")
def model(lab: Any) -> Any:
    return lab.model(student=lab.student(dtype="float32"))


def test_items_carry_what_each_target_prepared(model: Any, store: TraceStore, samples: list[Sample]) -> None:
    dataset = AlignedDataset(samples, model.student.builder(PROMPT), model.named_targets, store)
    for sample, (encoded, prepared) in zip(samples, (dataset[i] for i in range(3)), strict=True):
        assert encoded.sample == sample and list(prepared) == ["concept", "trajectory"]
        assert torch.equal(prepared["concept"]["semantics"], store.get(sample.id).semantics)
        assert prepared["trajectory"]["gaze"].sum() == pytest.approx(1, abs=1e-5)
        assert prepared["trajectory"]["gaze"].shape == ((encoded.roles == Role.IMAGE).sum(),)


def test_batches_go_through_the_model(model: Any, store: TraceStore, samples: list[Sample]) -> None:
    dataset = AlignedDataset(samples, model.student.builder(PROMPT), model.named_targets, store)
    collate = Collate(model.student.backbone.family, model.student.backbone.tokenizer.pad_token_id)
    (arguments,) = DataLoader(dataset, batch_size=3, collate_fn=collate)
    batch = arguments["batch"]
    assert batch.samples == samples and batch.targets["concept"]["semantics"].shape == (3, 24)
    tokens = [(batch.roles[b] == Role.IMAGE).sum().item() for b in range(3)]
    gaze = batch.targets["trajectory"]["gaze"]
    assert gaze.shape == (3, max(tokens)) and [(row[count:] == 0).all() for row, count in zip(gaze, tokens)]
    losses = model(**arguments)
    assert all(torch.isfinite(value) and value > 0 for value in losses.values())


def test_a_missing_trace_stops_before_the_first_step(model: Any, store: TraceStore, samples: list[Sample]) -> None:
    more = [*samples, replace(samples[0], id="d")]
    with pytest.raises(UserError, match="lacks the traces of 1 samples: 'd'"):
        AlignedDataset(more, model.student.builder(PROMPT), model.named_targets, store)
    with pytest.raises(UserError, match="concept, trajectory need traces: give traces.path".replace(".", r"\.")):
        AlignedDataset(samples, model.student.builder(PROMPT), model.named_targets, None)
    AlignedDataset(more, model.student.builder(PROMPT), {}, None)  # answers alone need none


def test_nothing_to_train_on(model: Any) -> None:
    with pytest.raises(UserError, match="no sample to train on"):
        AlignedDataset([], model.student.builder(PROMPT))


def test_kept_items_and_cached_features(model: Any, store: TraceStore, samples: list[Sample], tmp_path: Path) -> None:
    builder, targets = model.student.builder(PROMPT), model.named_targets
    cache = VisionCache(tmp_path, model.student.backbone)
    kept = AlignedDataset(samples, builder, targets, store, cache, keep=True)
    plain = AlignedDataset(samples, builder, targets, store)
    assert kept[1] is kept[1] and plain[1] is not plain[1]
    collate = Collate(model.student.backbone.family, 0)
    assert kept[1][0].features is not None and "pixel_values" not in kept[1][0].vision
    one, two = (model(**collate([d[0], d[1], d[2]])) for d in (kept, plain))
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-6)


def test_selection_by_verdicts(store: TraceStore, samples: list[Sample]) -> None:
    assert [s.id for s in select(samples, store, ("correctness",))] == ["a", "c"]
    assert [s.id for s in select(samples, store, ("correctness", "alignment"))] == ["a"]
    assert select(samples, store, ()) == samples
    with pytest.raises(UserError, match=r"no verdicts of a filter 'alignmnt'.*did you mean 'alignment'"):
        select(samples, store, ("alignmnt",))
    with pytest.raises(UserError, match=r"traces\.path is not given"):
        select(samples, None, ("correctness",))


def test_groups_are_images(model: Any, samples: list[Sample]) -> None:
    twice = [*samples, replace(samples[0], id="d")]
    groups = AlignedDataset(twice, model.student.builder(PROMPT)).groups
    assert groups[0] == groups[3] and len(set(groups)) == 3


def test_a_trace_of_other_images_is_named(lab: Any, model: Any, samples: list[Sample], tmp_path: Path) -> None:
    with TraceWriter(tmp_path, {"width": lab.width}) as writer:
        writer.append(replace(lab.trace(samples[2]), sample_id="a"))  # two images against one
    targets = {"trajectory": TrajectoryTarget()}
    dataset = AlignedDataset(samples[:1], model.student.builder(PROMPT), targets, TraceStore(tmp_path))
    with pytest.raises(UserError, match="sample 'a' cannot be a target: 2 images cannot be resampled to 1"):
        dataset[0]
