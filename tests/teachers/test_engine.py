"""The extraction: any split, any kill, any resumption leaves the same store; what cannot be read is put aside."""

from __future__ import annotations

import errno
import importlib.util
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from laavit.images import image_size
from laavit.registry import UserError
from laavit.structures import Sample, Trace
from laavit.teachers import ExtractSettings, HFTeacher, extract, loading
from laavit.teachers.base import SampleError
from laavit.teachers.engine import sample_ids, store_header
from laavit.teachers.plan import Plan, Share
from laavit.traces import shards
from laavit.traces.store import TraceStore, verify

GOLD = ExtractSettings(answer="gold", batch_size=3, shard_size=3)
SCRIPT = Path(__file__).with_name("scripted.py")
_spec = importlib.util.spec_from_file_location("scripted", SCRIPT)
assert _spec is not None and _spec.loader is not None
scripted = sys.modules["scripted"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(scripted)
contents, Extractor, Samples, Teacher = scripted.contents, scripted.Extractor, scripted.Samples, scripted.Teacher
ASIDE = {*scripted.GONE, *scripted.BROKEN, *scripted.MUTE}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extraction") / "images"
    folder.mkdir()
    Samples(folder)
    return folder


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """The store that one process leaves."""
    return scripted.run(root, root.parent / "whole")


def go(samples: Sequence[Sample], out: Path, reader: Any = None, **changes: Any) -> Any:
    """Extract with a reader; returns the reader."""
    reader = reader or Extractor()
    options = {name: changes.pop(name) for name in ("share", "retry") if name in changes}
    extract(Teacher(reader), samples, replace(scripted.SETTINGS, **changes), out, {"name": "scripted"}, **options)
    return reader


def test_the_store_holds_what_the_teacher_saw(tiny_folder: Path, samples: list[Sample], tmp_path: Path) -> None:
    teacher = HFTeacher(str(tiny_folder))
    store = TraceStore(extract(teacher, samples, GOLD, tmp_path / "store", {"name": "test"}))
    extractor = teacher.extractor(GOLD)
    expected = extractor([extractor.preparer(sample) for sample in samples])
    for trace, other in zip(store, expected, strict=True):
        assert torch.equal(trace.gaze, other.gaze) and torch.equal(trace.semantics, other.semantics)
    assert store.header["width"] == 32 and store.header["teacher"] == str(tiny_folder)
    assert store.header["weights_sha256"] == teacher.backbone.weights_digest()
    assert store.header["settings"]["rows"] == ["question", "header", "answer"]
    assert {"laavit", "torch", "transformers"} <= store.header.keys() and store.header["data"] == {"name": "test"}
    assert "workers" not in store.header["settings"]


def test_a_sparse_store_in_sixteen_bits(tiny_folder: Path, samples: list[Sample], tmp_path: Path) -> None:
    settings = replace(GOLD, gaze_top_k=3, semantics_dtype="float16")
    teacher = HFTeacher(str(tiny_folder))
    store = TraceStore(extract(teacher, samples, settings, tmp_path / "half", {}))
    plain = TraceStore(extract(teacher, samples, GOLD, tmp_path / "plain", {}))
    assert store.header["gaze_top_k"] == 3 and store.header["semantics_dtype"] == "float16"
    assert [(trace.gaze > 0).sum().item() for trace in store] == [3, 3, 3]
    assert torch.equal(store[0].semantics, plain[0].semantics.half().float())


def test_batches_are_of_like_images_and_stored_in_the_samples_order(root: Path, whole: Path) -> None:
    store, samples, reader = TraceStore(whole), Samples(root), Extractor()
    assert verify(whole) == {} and store.ids == tuple(key for key in samples.ids if key not in ASIDE)
    for start in range(0, scripted.COUNT, 10):  # a plain reading of the contract
        known = [samples[n] for n in range(start, min(start + 10, len(samples))) if samples.ids[n] not in scripted.GONE]
        area = {s.id: 0 if s.id in scripted.BROKEN else math.prod(image_size(s.images[0])) for s in known}
        ordered = sorted(known, key=lambda sample: -area[sample.id])
        for batch in (ordered[i : i + 4] for i in range(0, len(ordered), 4)):
            good = [sample for sample in batch if sample.id not in ASIDE]
            expected = reader([reader.preparer(sample) for sample in good]) if good else []
            for trace in expected:
                assert store.get(trace.sample_id).answer == trace.answer
                assert torch.equal(store.get(trace.sample_id).gaze, trace.gaze)


def test_samples_that_cannot_be_read_are_put_aside_with_their_reason(whole: Path) -> None:
    store = TraceStore(whole)
    assert store.quarantined.keys() == ASIDE and len(store) == scripted.COUNT - len(ASIDE)
    assert store.quarantined["s5"] == "there is no image of 's5'" and "s11.png" in store.quarantined["s11"]
    assert store.quarantined["s30"] == "the question says nothing"


@pytest.mark.parametrize("mode", ["ranks", "parts"])
def test_any_split_in_any_order_leaves_the_same_bytes(root: Path, whole: Path, tmp_path: Path, mode: str) -> None:
    for number, order in enumerate(itertools.permutations(scripted.SHARES[mode])):
        out = tmp_path / str(number)
        for share in order:
            scripted.run(root, out, share)
            if mode == "parts" and share is not order[-1]:
                assert TraceStore(out, complete=False).missing
        assert contents(out) == contents(whole) and not list(out.glob(".spool*"))


def test_parts_in_folders_of_their_own_are_one_store(root: Path, whole: Path, tmp_path: Path) -> None:
    merged = tmp_path / "0"
    for number, share in enumerate(scripted.SHARES["parts"]):
        out = scripted.run(root, tmp_path / str(number), share)
        assert (out / "header.json").read_bytes() == (whole / "header.json").read_bytes()
        for index in shards.shard_indices(out):
            shards.copy_shard(out, merged, index)
    assert contents(merged) == contents(whole)


def test_ranks_share_the_shards_and_help_each_other_out() -> None:
    shares = [Share(part, 2, rank, 3) for part in range(2) for rank in range(3)]
    assert shares[0].scope(14) == [0, 6, 12, 10, 8, 4, 2] and shares[4].scope(14) == [3, 9, 13, 11, 7, 5, 1]
    for part in range(2):
        assert {i for share in shares if share.part == part for i in share.scope(14)} == set(range(part, 14, 2))


@pytest.mark.parametrize("workers", [1, 3])
def test_data_workers_change_nothing(root: Path, whole: Path, tmp_path: Path, workers: int) -> None:
    scripted.run(root, tmp_path / "store", workers=workers)
    assert contents(tmp_path / "store") == contents(whole)


class Slow:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, sample: Sample) -> int:
        (self.folder / sample.id).touch()
        if sample.id == "dead":
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()


def test_workers_read_ahead_within_bounds_and_in_order(tmp_path: Path) -> None:
    batches = [[Sample(f"{b}.{i}", (), "q", "a") for i in range(3)] for b in range(20)]
    found = loading.prepared(Slow(tmp_path), batches, workers=2)
    first = next(found)
    time.sleep(0.5)
    assert 3 * 3 <= len(list(tmp_path.iterdir())) <= 3 * (2 * loading.AHEAD + 1)
    rest = [[item.sample_id for item in batch] for batch in found]
    assert [[item.sample_id for item in first], *rest] == [[sample.id for sample in batch] for batch in batches]
    assert all(item.value != os.getpid() for item in first)


def test_a_dead_worker_is_one_sentence(tmp_path: Path) -> None:
    batches = [[Sample("dead", (), "q", "a")], [Sample("s", (), "q", "a")]]
    with pytest.raises(UserError, match=r"a data worker died.*extract.workers"):
        list(loading.prepared(Slow(tmp_path), batches, workers=1))


def test_retrying_takes_what_was_mended(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    out = tmp_path / "store"
    go(Samples(folder), out)
    before = contents(out)
    assert go(Samples(folder, mended=True), out).seen == []  # put aside is done
    assert contents(out) == before
    again = go(Samples(folder), out, retry=True)
    assert {key for batch in again.seen for key in batch} == {f"s{n}" for n in range(43) if n // 10 != 2} - ASIDE
    assert contents(out) == before
    go(Samples(folder, mended=True), out, retry=True)
    assert TraceStore(out).quarantined == {}
    go(Samples(folder, mended=True), tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")
    with pytest.raises(UserError, match="--retry is for one process"):
        go(Samples(folder), out, retry=True, share=Share(rank=1, ranks=2))


class Unreadable(Samples):
    """Every sample of some shards cannot be read."""

    bad: tuple[int, ...] = ()

    def __getitem__(self, index: Any) -> Any:
        if index // 10 in self.bad:
            raise UserError("the folder is not mounted" if index % 10 else "one of its own")
        return super().__getitem__(index)


def test_when_nothing_can_be_read_the_run_stops(root: Path, whole: Path, tmp_path: Path) -> None:
    samples = Unreadable(root)
    samples.bad = (0, 1)
    with pytest.raises(
        UserError, match=r"none of the first 10 samples.*9 of them, for example 's1': the folder is not"
    ):
        go(samples, tmp_path)
    assert not shards.shard_indices(tmp_path)
    go(Samples(root), tmp_path)
    assert contents(tmp_path) == contents(whole)
    samples.bad = (1,)  # not the first: the others are there, so it is the samples' own matter
    go(samples, tmp_path / "store")
    assert len(TraceStore(tmp_path / "store").quarantined) == len(ASIDE) - 2 + 10


class Refusing(Extractor):
    """Two samples of one batch have no trace, and one has figures that float16 does not hold."""

    def __call__(self, prepared: Sequence[tuple[str, int]]) -> list[Trace]:
        for key, _ in prepared:
            if key in ("s2", "s4"):  # neither is the first of its batch
                raise SampleError(key, f"no recorded row of sample '{key}' sees its image")
        found = super().__call__(prepared)
        return [replace(t, semantics=t.semantics * 1e6) if t.sample_id == "s20" else t for t in found]


def test_a_sample_without_a_trace_is_put_aside_and_its_batch_is_read_without_it(root: Path, tmp_path: Path) -> None:
    reader = go(Samples(root), tmp_path / "one", Refusing(), semantics_dtype="float16")
    store = TraceStore(tmp_path / "one")
    refused = {"s2", "s4", "s20"}
    assert store.quarantined.keys() == ASIDE | refused and len(store) == scripted.COUNT - len(ASIDE | refused)
    assert "no recorded row of sample 's2'" in store.quarantined["s2"]
    assert "not finite as float16" in store.quarantined["s20"]
    assert not any({"s2", "s4"} & set(batch) for batch in reader.seen)
    for part in (2, 0, 1):
        go(Samples(root), tmp_path / "parts", Refusing(), semantics_dtype="float16", share=Share(part, 3))
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")


@pytest.mark.parametrize("call", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("the trace of sample 's' is not finite"), "not finite"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "memory ran out with extract.batch_size 4"),
        (MemoryError(), "memory ran out"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk of .* is full"),
    ],
)
def test_what_is_no_samples_fault_stops_and_costs_one_batch(
    root: Path, whole: Path, tmp_path: Path, call: int, error: Exception, said: str
) -> None:
    def spoil(number: int) -> None:
        if number == call:
            raise error

    with pytest.raises(UserError, match=said):
        go(Samples(root), tmp_path, Extractor(spoil=spoil))
    every = go(Samples(root), tmp_path / "other").seen
    assert go(Samples(root), tmp_path).seen == every[call - 1 :]  # the finished batches are not done again
    other = {name: text for name, text in contents(tmp_path).items() if not name.startswith("other")}
    assert other == contents(whole)


def test_other_errors_are_no_riddles(root: Path, tmp_path: Path) -> None:
    def spoil(number: int) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        go(Samples(root), tmp_path, Extractor(spoil=spoil))


def test_a_full_disk_is_told_wherever_it_is_met(root: Path, whole: Path, tmp_path: Path, monkeypatch: Any) -> None:
    calls, write = itertools.count(), shards.write_bytes

    def full(path: Path, content: bytes, sync: bool = True) -> None:
        if next(calls) == turn:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content, sync)

    for turn in (0, 1, 2, 7, 8, 20):
        calls = itertools.count()
        monkeypatch.setattr(shards, "write_bytes", full)
        with pytest.raises(UserError, match="is full"):
            go(Samples(root), tmp_path / str(turn))
        monkeypatch.undo()
        go(Samples(root), tmp_path / str(turn))
        assert contents(tmp_path / str(turn)) == contents(whole)


@pytest.mark.parametrize("damage", ["truncated", "changed", "no record", "of other samples", "gone"])
def test_damaged_shards_are_done_again(root: Path, whole: Path, tmp_path: Path, damage: str) -> None:
    out = scripted.run(root, tmp_path / "store")
    path = shards.shard_path(out, 2)
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-5])
    elif damage == "changed":
        path.write_bytes(content[:-50] + bytes([content[-50] ^ 4]) + content[-49:])
    elif damage == "no record":
        path.with_suffix(".json").unlink()
    elif damage == "of other samples":
        for suffix in (".arrow", ".json"):
            path.with_suffix(suffix).write_bytes(shards.shard_path(out, 1).with_suffix(suffix).read_bytes())
    else:
        shards.drop_shard(out, 2)
    seen = {key for batch in go(Samples(root), out).seen for key in batch}
    assert seen == {f"s{n}" for n in range(20, 30)} and contents(out) == contents(whole)


def test_a_damaged_batch_of_an_unfinished_shard_is_done_again(root: Path, whole: Path, tmp_path: Path) -> None:
    def spoil(number: int) -> None:
        if number == 3:
            raise UserError("stop")

    with pytest.raises(UserError, match="stop"):
        go(Samples(root), tmp_path, Extractor(spoil=spoil))
    first, second = sorted((tmp_path / ".spool-00000").glob("*.arrow"))
    second.write_bytes(second.read_bytes()[:-3])
    assert len(go(Samples(root), tmp_path).seen) == len(go(Samples(root), tmp_path / "other").seen) - 1
    assert contents(tmp_path / "other") == contents(whole)
    assert not first.exists()


def test_a_store_grows_with_its_data(root: Path, whole: Path, tmp_path: Path) -> None:
    fewer = Samples(root, 26)
    extract(Teacher(Extractor()), fewer, scripted.SETTINGS, tmp_path, {"name": "fewer", "limit": 26})
    assert TraceStore(tmp_path).planned == 26
    seen = {key for batch in go(Samples(root), tmp_path).seen for key in batch}
    assert seen == {f"s{n}" for n in range(20, 43)} - ASIDE  # the shorter last shard, and the new ones
    assert contents(tmp_path) == contents(whole)


def test_other_data_or_settings_than_the_store_was_begun_with(root: Path, tmp_path: Path) -> None:
    def attempt(samples: Any = None, data: Any = None, teacher: Any = None, **changes: Any) -> None:
        settings = replace(scripted.SETTINGS, **changes)
        extract(teacher or Teacher(Extractor()), samples or Samples(root), settings, tmp_path, data or {"sha": "1"})

    attempt()
    before = contents(tmp_path)
    for given, said in (
        ({"top_k": 4}, r"'settings.top_k' is 8 in the store and 4 here"),
        ({"gaze_top_k": 4}, r"'gaze_top_k' is None in the store and 4 here"),
        ({"shard_size": 8}, r"'shard_size' is 10 in the store and 8 here"),
        ({"data": {"sha": "2"}}, r"'data.sha' is '1' in the store and '2' here"),
        ({"teacher": Teacher(Extractor(), weights="1")}, r"'weights_sha256' is '0' in the store and '1' here"),
        ({"samples": Samples(root, 42)}, "43 in the store and 42 here, which differ between number 40 and 49"),
    ):
        with pytest.raises(UserError, match=said):
            attempt(**given)
    swapped = Samples(root)
    swapped.ids = (*swapped.ids[:14], "s99", *swapped.ids[15:])
    with pytest.raises(UserError, match="differ between number 10 and 19"):
        attempt(samples=swapped)
    swapped.ids = (*swapped.ids[:14], "s2", *swapped.ids[15:])
    with pytest.raises(UserError, match="samples 2 and 14 have the same id 's2'"):
        attempt(samples=swapped)
    assert contents(tmp_path) == before
    attempt(workers=1)  # no bit depends on them


def test_where_the_data_lie_may_differ_between_machines(root: Path, tmp_path: Path) -> None:
    samples = Samples(root)
    card = {"annotations": "/a/train.json", "root": "/a", "annotations_sha256": "1"}
    extract(Teacher(Extractor()), samples, scripted.SETTINGS, tmp_path, card)
    extract(Teacher(Extractor()), samples, scripted.SETTINGS, tmp_path, card | {"annotations": "/b", "root": "/b"})
    with pytest.raises(UserError, match="annotations_sha256"):
        extract(Teacher(Extractor()), samples, scripted.SETTINGS, tmp_path, card | {"annotations_sha256": "2"})


def test_places_that_are_no_store(root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"not empty \(it holds 'thesis.tex'\)"):
        go(Samples(root), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        go(Samples(root), tmp_path / "thesis.tex")


def test_a_shard_in_other_hands_is_left_alone_and_a_dead_ones_is_not(root: Path, whole: Path, tmp_path: Path) -> None:
    header = store_header(Teacher(Extractor()).card(), scripted.SETTINGS, {"name": "scripted"})
    plan = Plan.open(tmp_path, sample_ids(Samples(root)), header, 10)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with plan.claim(1) as mine:
            (tmp_path / ".tmp-7-shard-00001.arrow").write_bytes(b"half")
            os.write(writing, b"1" if mine else b"0")
            time.sleep(600)
        os._exit(0)
    assert os.read(reading, 1) == b"1"
    with plan.claim(1) as mine:
        assert not mine
    go(Samples(root), tmp_path, share=Share(rank=1, ranks=2))  # all but that one, without waiting
    assert list(TraceStore(tmp_path, complete=False).missing) == [1]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    go(Samples(root), tmp_path)
    assert contents(tmp_path) == contents(whole) and not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize(
    ("part", "environment", "expected"),
    [
        (None, {}, Share()),
        ("2/3", {}, Share(1, 3)),
        (None, {"RANK": "1", "WORLD_SIZE": "4"}, Share(rank=1, ranks=4)),
        ("3/3", {"RANK": "0", "WORLD_SIZE": "2"}, Share(2, 3, 0, 2)),
        ("0/3", {}, "--part is i/n"),
        ("4/3", {}, "--part is i/n"),
        ("a", {}, "--part is i/n"),
        (None, {"RANK": "2", "WORLD_SIZE": "2"}, "RANK is '2'"),
        (None, {"RANK": "x"}, "RANK is 'x'"),
    ],
)
def test_shares(monkeypatch: pytest.MonkeyPatch, part: Any, environment: dict[str, str], expected: Any) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, Share):
        assert Share.of(part) == expected
    else:
        with pytest.raises(UserError, match=expected):
            Share.of(part)


def killed(root: Path, whole: Path, folder: Path, seed: int, workers: int = 0) -> dict[str, int]:
    """Kill every mode's processes again and again, each time resumed; returns the kills of each mode."""
    folder.mkdir(exist_ok=True)
    (folder / "images").symlink_to(root)
    command = [sys.executable, str(SCRIPT), str(folder), str(seed), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for mode in scripted.SHARES:
        assert verify(folder / mode) == {} and TraceStore(folder / mode).ids == TraceStore(whole).ids
        assert contents(folder / mode) == renamed(whole, root, folder / "images")
    return json.loads(done.stdout)


def renamed(whole: Path, root: Path, images: Path) -> dict[str, bytes]:
    """A store's files as they are where the images lie elsewhere (reasons name the file)."""
    return {name: text.replace(str(root).encode(), str(images).encode()) for name, text in contents(whole).items()}


def test_killed_at_random_moments_and_resumed(root: Path, whole: Path, tmp_path: Path) -> None:
    assert min(killed(root, whole, tmp_path / "killed", 7).values()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_many_kills(root: Path, whole: Path, tmp_path: Path, workers: int) -> None:
    found = [killed(root, whole, tmp_path / str(seed), seed, workers) for seed in range(8)]
    assert all(sum(kills[mode] for kills in found) >= 20 for mode in scripted.SHARES)
