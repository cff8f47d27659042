"""Samples beside their traces: what is missing stops before the first step, and what is read is what was stored."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from laavit.backbones import PromptSettings
from laavit.backbones.vision_cache import VisionCache
from laavit.data.aligned import SETS, AlignedDataset, Collate, Subset, encodings, ids_of, image_keys_of, select
from laavit.data.visual_cot import VisualCoT
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


def test_runs_of_one_process_encode_a_sample_once(model: Any, store: TraceStore, samples: list[Sample]) -> None:
    """The encoding is one for all data sets of a key; what targets prepare is each data set's own."""
    builder, shared = model.student.builder(PROMPT), encodings("a key")
    first = AlignedDataset(samples, builder, model.named_targets, store, keep=True, encoded=shared)
    second = AlignedDataset(samples, builder, {}, None, keep=True, encoded=encodings("a key"))
    assert first[0][0] is second[0][0] and first[0][1].keys() == {"concept", "trajectory"} and not second[0][1]
    other = AlignedDataset(samples, builder, {}, None, keep=True, encoded=encodings("another key"))
    assert other[0][0] is not first[0][0] and torch.equal(other[0][0].input_ids, first[0][0].input_ids)
    for number in range(SETS):
        encodings(number)
    assert encodings("a key") is not shared  # forgotten: memory does not grow with a sweep


def test_the_key_of_encodings_is_all_they_depend_on(lab: Any, model: Any) -> None:
    keys = {
        model.student.builder(PROMPT).key,
        model.student.builder(replace(PROMPT, suffix=" Briefly.")).key,
        model.student.builder(replace(PROMPT, order="question_first")).key,
        model.student.backbone.builder(PROMPT, 0).key,  # no latents
    }
    assert len(keys) == 4 and model.student.builder(PROMPT).key in keys
    builder = lab.student(dtype="float32").builder(PROMPT)
    before = builder.key
    builder.processor.image_processor.max_pixels = builder.processor.image_processor.size["longest_edge"] = 4321
    assert builder.key != before


def test_selection_by_verdicts(store: TraceStore, samples: list[Sample]) -> None:
    assert [s.id for s in select(samples, store, ("correctness",))] == ["a", "c"]
    assert [s.id for s in select(samples, store, ("correctness", "alignment"))] == ["a"]
    assert select(samples, store, ()) == samples
    with pytest.raises(UserError, match=r"no verdicts of a filter 'alignmnt'.*did you mean 'alignment'"):
        select(samples, store, ("alignmnt",))
    with pytest.raises(UserError, match=r"traces\.path is not given"):
        select(samples, None, ("correctness",))


class Reader(Sequence[Sample]):
    """A reader of any length that knows its ids and images; asking it for a sample is counted."""

    def __init__(self, like: Sample, count: int) -> None:
        self.like, self.asked = like, 0
        self.ids = tuple(map(str, range(count)))
        self.image_keys = [(f"{place // 4}.png",) for place in range(count)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        self.asked += 1
        return replace(self.like, id=self.ids[index])


def test_a_reader_names_its_images_without_touching_them(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "<answer> blue </answer>"}]
    records = [
        {"question_id": i, "split": split, "image": images, "conversations": turns}
        for i, (split, images) in enumerate([("train", ["a.png"]), ("test", ["x.png"]), ("train", ["b.png", "a.png"])])
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    reader = VisualCoT(tmp_path / "data.json", tmp_path, split="train")
    assert image_keys_of(reader) == [("a.png",), ("b.png", "a.png")] and list(ids_of(reader)) == ["0", "2"]
    assert image_keys_of(Subset(reader, [1])) == [("b.png", "a.png")]


def some_store(keys: Sequence[str], quarantined: Sequence[str] = (), passed: Sequence[str] = ()) -> Any:
    """Stands for a store of many traces: its ids, its verdicts and what was put aside."""

    class Store(dict[str, None]):
        path, quarantined, select = Path("traces"), dict[str, str](), None
        require, _places = TraceStore.require, property(lambda self: self)

    store = Store.fromkeys(keys)
    store.quarantined = dict.fromkeys(quarantined, "no image")
    store.select = lambda filters: tuple(passed)
    return store


def test_404_120_samples_are_chosen_by_their_ids(samples: list[Sample]) -> None:
    """Selecting, requiring and grouping touch no sample, and take a second or two."""
    count = 404_120
    reader = Reader(samples[0], count)
    store = some_store(reader.ids[:-20], reader.ids[-20:], reader.ids[:-20:3])
    began = time.perf_counter()
    chosen = select(reader, store, ("alignment",))
    target = TrajectoryTarget()
    dataset = AlignedDataset(chosen, builder=None, targets={"t": target}, store=store)  # type: ignore[arg-type]
    groups = dataset.groups
    assert time.perf_counter() - began < 10
    assert reader.asked == 0 and len(dataset) == len(range(0, count - 20, 3)) and groups[1] == ("0.png",)
    assert [chosen[1].id, chosen[-1].id] == ["3", "404097"] and reader.asked == 2
    assert [sample.id for sample in chosen[2:4]] == ["6", "9"]


def test_what_the_extraction_put_aside_is_left_out(samples: list[Sample], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="laavit"):
        chosen = select(samples, some_store(["a", "c"], ["b"]))
    assert [sample.id for sample in chosen] == ["a", "c"] and list(ids_of(chosen)) == ["a", "c"]
    assert "1 of 3 samples were put aside" in caplog.text
    with pytest.raises(UserError, match="lacks the traces of 1 samples: 'c'"):
        select(samples, some_store(["a"], ["b"]))
    with pytest.raises(UserError, match="no sample to train on"):
        select(samples, some_store(["a", "b", "c"]), ("alignment",))


def test_chosen_samples_alone_are_checked(samples: list[Sample]) -> None:
    """An image that is missing stops a run before it begins, unless its sample was put aside."""

    class Missing(list[Sample]):
        def __getitem__(self, index: Any) -> Any:
            if index == 1:
                raise UserError("there is no image 'b.png'")
            return super().__getitem__(index)

    broken = Missing(samples)
    Subset(broken, [0, 2]).check()
    with pytest.raises(UserError, match="no image"):
        Subset(broken, [0, 1]).check()


def test_a_family_without_cached_features_is_named(model: Any, samples: list[Sample], tmp_path: Path) -> None:
    cache = VisionCache(tmp_path, model.student.backbone)
    family = type("Other", (), {"takes_features": False})()
    cache.backbone = type("Backbone", (), {"family": family})()  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"traces\.vision_cache: the family Other takes no cached image features"):
        AlignedDataset(samples, model.student.builder(PROMPT), {}, None, cache)


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
