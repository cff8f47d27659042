"""The base of the readers: the index and when it is made anew, ids of doubles, streams, and any JSON at all."""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from laavit.data import Lavit15k, Llava, VisualCoT, streams
from laavit.data.index import Quarantined
from laavit.registry import UserError

_spec = importlib.util.spec_from_file_location("corpus", Path(__file__).with_name("corpus.py"))
assert _spec is not None and _spec.loader is not None
corpus = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(corpus)
four, two, talk = corpus.four, corpus.two, corpus.talk

Read = Callable[..., VisualCoT]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images" / "cot").mkdir(parents=True)
    Image.new("RGB", (100, 50)).save(tmp_path / "images" / "cot" / "a.png")
    return tmp_path / "images"


@pytest.fixture
def read(root: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    monkeypatch.setenv("LAAVIT_CACHE", str(root.parent / "cache"))

    def reader(records: Any = None, **arguments: Any) -> VisualCoT:
        file = root.parent / "annotations.json"
        if records is not None:
            file.write_text(json.dumps(records))
        return VisualCoT(file, root, **arguments)

    return reader


def indexes(root: Path) -> list[Path]:
    return sorted(path.parent for path in (root.parent / "cache").rglob("index.json"))


# --- the index ---


def test_a_second_opening_reads_the_index_alone(read: Read, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read([four(1), four(2), {}])
    monkeypatch.setattr(streams, "values", lambda *a: pytest.fail("the file was read again"))
    second = read()
    assert list(second) == list(first) and second.quarantined == first.quarantined
    assert read(limit=1).ids == ("1",) and len(indexes(root)) == 1, "limit and split are of the opening"


@pytest.mark.parametrize("age", [0, 100])
def test_a_changed_file_is_read_again_and_its_former_index_goes(read: Read, root: Path, age: int) -> None:
    file = root.parent / "annotations.json"
    file.write_text(json.dumps([four(1), four(2)]))
    os.utime(file, (time.time() - age, time.time() - age))
    assert read().ids == ("1", "2")
    before = file.stat()
    file.write_text(json.dumps([four(1), four(3)]))  # as long as before
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert read().ids == ("1", "3") and len(indexes(root)) == 1


def test_a_file_written_twice_within_one_tick_is_told_by_its_bytes(
    read: Read, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from laavit.data import index

    monkeypatch.setattr(index, "_stamp", lambda sources: [[1, 10**19, 0, 1]] * len(sources))
    monkeypatch.setattr(index, "_digest", lambda content: "0" * 64)  # the file system says nothing
    assert read([four(1)]).ids == ("1",) and read([four(2)]).ids == ("2",)


def test_settings_and_versions_have_indexes_of_their_own(
    read: Read, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read([four(1)])
    assert len(read(max_characters=60)) == 1 and len(indexes(root)) == 2
    monkeypatch.setattr(VisualCoT, "version", 99)
    assert len(read()) == 1 and len(indexes(root)) == 3


def test_an_interrupted_writing_leaves_nothing(read: Read, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> Any:
        yield "record 0", four(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(streams, "values", stop)
        read([four(1)])
    assert indexes(root) == [] and not list((root.parent / "cache").rglob("*.arrow"))
    assert read().ids == ("1",)


def test_a_cache_that_cannot_be_written_is_one_sentence(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAAVIT_CACHE", "/proc/nowhere")
    with pytest.raises(UserError, match=r"index of .* cannot be kept in '/proc/nowhere.*set LAAVIT_CACHE"):
        read([four(1)])


@pytest.mark.parametrize("name", ["records.arrow", "samples.arrow", "index.json"])
def test_a_damaged_index_is_written_anew(read: Read, root: Path, name: str) -> None:
    file = root.parent / "annotations.json"
    file.write_text(json.dumps([four(1), four(2)]))
    os.utime(file, (time.time() - 100, time.time() - 100))
    read()
    (folder,) = indexes(root)
    whole = (folder / name).read_bytes()
    for rest in (whole[: len(whole) // 2], b"", None):
        (folder / name).unlink()
        if rest is not None:
            (folder / name).write_bytes(rest)
        assert read().ids == ("1", "2") and read()[1].question == "What does the child wear?"


def test_a_cache_that_can_only_be_read_serves(read: Read, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from laavit.data import index

    read([four(1)])
    assert read().ids == ("1",)  # the second opening confirms an index that is as young as its file
    monkeypatch.setattr(index, "FileLock", lambda path: pytest.fail("locked"))
    assert read().ids == ("1",)


def ids_of(file: Path, root: Path, cache: Path, queue: Any) -> None:
    os.environ["LAAVIT_CACHE"] = str(cache)
    queue.put(VisualCoT(file, root).ids)


def test_processes_that_open_together_write_one_index(root: Path) -> None:
    file, cache = root.parent / "annotations.json", root.parent / "cache"
    file.write_text(json.dumps([four(i) for i in range(3000)]))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=ids_of, args=(file, root, cache, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert found == {tuple(map(str, range(3000)))} and len(indexes(root)) == 1


def test_a_reader_travels_to_a_worker(read: Read) -> None:
    reader = read([four(i) for i in range(500)])
    reader.get("3")
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301 - made here
    assert copy[7] == reader[7] and copy.get("9") == reader[9] and copy.quarantined == reader.quarantined


def test_iteration_slices_and_single_samples_agree(read: Read) -> None:
    reader = read([four(i) for i in range(1500)], limit=1400)
    assert list(reader)[1023:1026] == reader[1023:1026] == [reader[i] for i in range(1023, 1026)]
    assert len(list(reader)) == 1400 and reader.sources_by_id()["7"] == "flickr30k"
    assert reader.image_keys[3] == ("cot/a.png",) and reader.read == 1500


def test_quarantine_is_logged_with_counts(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "laavit"):
        reader = read([four(1), {}, four(3, box="[nan, 0, 1, 1]"), four(4, box="x")])
    (line,) = caplog.messages
    assert line.endswith("3 records are in quarantine (box 2, id 1)")
    assert isinstance(reader.quarantined[0], Quarantined) and reader.quarantined[2].kind == "box"


# --- ids ---


def test_doubles(read: Read) -> None:
    other = two(7, conversations=talk("Another question?", "<answer>yes</answer>"))
    reader = read([two(7), two(8), two(7), other, two("7", dataset="gqa"), other])
    assert reader.ids == ("flickr30k-7", "flickr30k-8", "gqa-7")
    assert [(found.where, found.id, found.reason) for found in reader.quarantined] == [
        ("record 2", "7", "duplicate: record 0 is the same"),
        ("record 3", "7", "id: record 0 is another record with the id 'flickr30k-train-7'"),
        ("record 5", "7", "id: record 0 is another record with the id 'flickr30k-train-7'"),
    ]


def test_numbers_and_texts_are_one_kind_of_id(read: Read) -> None:
    reader = read([four(1), four("1", dataset="gqa"), four("x"), four("2")])
    assert reader.ids == ("flickr30k-1", "gqa-1", "flickr30k-x", "flickr30k-2")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.lists(
        st.tuples(st.sampled_from("ab-"), st.sampled_from(["x", "y", "x-x"]), st.sampled_from("pq")), max_size=12
    )
)
def test_ids_are_unique_and_nothing_is_lost(read: Read, keys: list[tuple[str, str, str]]) -> None:
    records = [two(key, dataset=source, kind=content) for source, key, content in keys]
    if not records:
        return
    reader = read(records)
    assert len(set(reader.ids)) == len(reader) and len(reader) + len(reader.quarantined) == len(records)
    assert len(reader) >= len({(source, key) for source, key, _ in keys} - {("a-", "x")}) - 1
    places = {int(found.where.split()[1]) for found in reader.quarantined}
    kept = [key for place, key in enumerate(keys) if place not in places]
    assert [(s.source, s.meta["kind"]) for s in reader] == [(source, content) for source, _, content in kept]


# --- streams ---


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("form", corpus.FORMS)
def test_the_size_of_a_chunk_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, chunk: int
) -> None:
    path = tmp_path / "x"
    path.write_bytes(corpus.FORMS[form]())
    whole = list(streams.values(path))
    monkeypatch.setattr(streams, "CHUNK", chunk)
    assert list(streams.values(path)) == whole and [value for _, value in whole] == [four(i) for i in range(4)]


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_broken_values_are_skipped_whatever_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(streams, "CHUNK", chunk)
    path = tmp_path / "x"
    path.write_text('[1, tru, "a\\"b]", {"k": "}"}, {"k" 1}, [1 2], -, 12.5e3, null]')
    found = [value for _, value in streams.values(path)]
    assert [i for i, value in enumerate(found) if isinstance(value, streams.Broken)] == [1, 4, 5, 6]
    assert [found[i] for i in (0, 2, 3, 7, 8)] == [1, 'a"b]', {"k": "}"}, 12500.0, None]


def test_a_value_without_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LONGEST", 1 << 12)
    monkeypatch.setattr(streams, "CHUNK", 1 << 10)
    path = tmp_path / "x"
    path.write_text('[{"a": "' + "x" * 100_000)
    with pytest.raises(UserError, match="does not end within 4096 characters"):
        list(streams.values(path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(JSON, max_size=6), form=st.sampled_from(["list", "lines", "gzip"]))
def test_streams_give_back_what_was_written(tmp_path: Path, values: list[Any], form: str) -> None:
    path = tmp_path / "x"
    if form == "lines":
        values = [{"v": value} for value in values]
        text = "\n".join(map(json.dumps, values))
    else:
        text = json.dumps(values)
    path.write_bytes(gzip.compress(text.encode()) if form == "gzip" else text.encode())
    if form == "lines" and not values:
        return
    assert repr([value for _, value in streams.values(path)]) == repr(json.loads(json.dumps(values)))


# --- any JSON at all ---

KEYS = [
    "question_id",
    "id",
    "dataset",
    "split",
    "image",
    "images",
    "conversations",
    "bboxes",
    "from",
    "value",
    "question",
]
KEYS += ["ground_truth_enriched", "image_relative_path", "v_top_path_abs"]
WORDS = [
    "human",
    "gpt",
    "cot/a.png",
    "cot/a.png###[1, 2, 3, 4]",
    "[0, 0, 1, 1]",
    "<image>",
    "train",
    "../x",
    "\0",
    "\ud800",
]
NEARLY = st.recursive(
    st.none() | st.integers(-2, 3) | st.floats() | st.sampled_from(WORDS) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=25,
)
MUTATED = st.builds(
    lambda record, key, value: record | {key: value},
    st.sampled_from([four(5), two(6)]),
    st.sampled_from(KEYS),
    NEARLY,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(NEARLY | MUTATED, max_size=4), cls=st.sampled_from([VisualCoT, Llava, Lavit15k]))
def test_any_json_is_a_sample_or_in_quarantine(
    root: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any], cls: type
) -> None:
    monkeypatch.setenv("LAAVIT_CACHE", str(root.parent / "cache"))
    good = {
        "id": "good",
        "image": "cot/a.png",
        "image_relative_path": "cot/a.png",
        "question": "q",
        "ground_truth_enriched": "a",
        "conversations": talk("q", "a"),
    }
    file = root.parent / "annotations.json"
    file.write_text(json.dumps([*values, good]))
    reader = cls(file, root)
    assert reader.ids[-1].endswith(("good", "good-1")) and reader.read >= len(values) + 1
    broken = dict(reader.broken())
    for sample_id in set(reader.ids) - set(broken):
        sample = reader.get(sample_id)
        assert sample.question.strip() and sample.answer.strip() and sample.images
        assert all(
            0 <= b.x1 < b.x2 <= 1 and 0 <= b.y1 < b.y2 <= 1 and b.image < len(sample.images) for b in sample.boxes
        )
    assert all(re.fullmatch(r"[a-z_]+: .+", found.reason, re.DOTALL) for found in reader.quarantined)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda text: text.strip() and "<" not in text and not text.strip().rstrip(".").lower().endswith("response")
)
SHARE = st.integers(0, 999)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5),
    sides=st.tuples(SHARE, SHARE, st.integers(1, 1000), st.integers(1, 1000)),
)
def test_good_records_come_back_as_they_were(
    read: Read, texts: list[tuple[str, str, str]], sides: tuple[int, int, int, int]
) -> None:
    x1, y1 = sides[0] / 1000, sides[1] / 1000
    x2, y2 = min(x1 + sides[2] / 1000, 1.0), min(y1 + sides[3] / 1000, 1.0)
    records = [
        two(number, dataset=source, conversations=talk(question, answer), bboxes=[[x1, y1, x2, y2]])
        for number, (question, answer, source) in enumerate(texts)
    ]
    reader = read(records)
    assert not reader.quarantined
    for sample, (question, answer, source) in zip(reader, texts, strict=True):
        assert (sample.question, sample.answer, sample.source) == (question.strip(), answer.strip(), source)
        (box,) = sample.boxes
        assert (box.x1, box.y1, box.x2, box.y2) == (x1, y1, x2, y2)


# --- size ---


def test_memory_is_bounded_by_the_block_not_the_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30,000 records, 16 MB of text and 80 MB of objects: reading them takes less than half of holding them."""
    monkeypatch.setenv("LAAVIT_CACHE", str(root.parent / "cache"))
    bench, path = _bench(), root.parent / "x.json"
    bench.write(path, 30_000)
    first, again, loaded = (bench.worker(way, path) for way in ("first opening", "second opening", "json.load"))
    assert first["samples"] == again["samples"] == loaded["samples"] == 30_000
    assert first["bytes"] < loaded["bytes"] / 2 and first["bytes"] < 50 * 2**20, (first, loaded)
    assert again["seconds"] < 1.0 and again["bytes"] < 20 * 2**20


@pytest.mark.slow
def test_the_published_size_within_300_mb(tmp_path: Path) -> None:
    bench, out = _bench(), tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, bench.__file__, "--folder", str(tmp_path), "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0 and "| first opening |" in done.stdout, done.stderr
    loaded, first, again = json.loads(out.read_text())["rows"]
    assert loaded["samples"] == first["samples"] == again["samples"] == 404_120
    assert first["bytes"] < 300 * 2**20 and first["cpu"] < 30 and again["seconds"] < 2


def _bench() -> Any:
    spec = importlib.util.spec_from_file_location(
        "reader_bench", Path(__file__).parents[2] / "tools" / "bench" / "reader.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
