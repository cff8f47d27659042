"""The trace store: round trip, resuming to the same bits, damage, headers, verdict columns."""

import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from laavit.files import TEMPORARY
from laavit.registry import UserError
from laavit.structures import Trace
from laavit.traces import shards
from laavit.traces.gaze import top_k
from laavit.traces.store import TraceStore, TraceWriter

SCRIPT = Path(__file__).with_name("writing.py")
_spec = importlib.util.spec_from_file_location("writing", SCRIPT)
assert _spec is not None and _spec.loader is not None
writing = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(writing)
contents = writing.contents


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "store"
    writing.write(folder)
    return folder


def small(path, ids=("a", "b", "c"), header=None, size=2):
    with TraceWriter(path, header or {"teacher": "t"}, shard_size=size) as writer:
        for number, key in enumerate(ids):
            if key not in writer.done:
                writer.append(replace(writing.trace(number), sample_id=key))
    return TraceStore(path)


def same(first: Trace, second: Trace) -> bool:
    tensors = all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("gaze", "semantics"))
    plain = ("sample_id", "answer", "tiles", "mass", "verdicts", "scores")
    return tensors and all(getattr(first, name) == getattr(second, name) for name in plain)


def test_full_maps_come_back_bit_for_bit(tmp_path):
    given = replace(writing.trace(3), verdicts={"kept": True, "not": False}, scores={"kept": 0.25})
    with TraceWriter(tmp_path, {}) as writer:
        writer.append(given)
        writer.append(writing.trace(4))
    store = TraceStore(tmp_path)
    assert same(store.get("s3"), given) and same(store[1], writing.trace(4)) and same(store[-1], store[1])
    assert store.header == {"gaze_top_k": None, "semantics_dtype": "float32"}
    assert (
        len(store) == 2 and "s3" in store and "s9" not in store and [trace.sample_id for trace in store] == ["s3", "s4"]
    )


def test_sparse_maps_come_back_dense(uninterrupted):
    store = TraceStore(uninterrupted)
    assert len(store) == writing.COUNT and store.ids == tuple(f"s{n}" for n in range(writing.COUNT))
    for number in (0, 1, 77, writing.COUNT - 1):
        trace, original = store[number], writing.trace(number)
        assert torch.equal(trace.gaze, top_k(original.gaze, 4)) and trace.gaze.dtype == torch.float32
        assert torch.equal(trace.semantics, original.semantics.half().float())
        assert trace.tiles == original.tiles and trace.answer == original.answer


def test_reading_gives_copies(tmp_path):
    store = small(tmp_path)
    store[0].gaze.zero_()
    assert store[0].gaze.sum() > 0


def test_a_store_travels_to_a_worker_process(uninterrupted):
    store = TraceStore(uninterrupted)
    assert same(pickle.loads(pickle.dumps(store)).get("s5"), store.get("s5"))  # noqa: S301


@pytest.mark.parametrize("stops", [(1,), (16,), (17, 40), (5, 64, 149), (150,)])
def test_closing_and_resuming_leaves_the_same_bits(tmp_path, uninterrupted, stops):
    for stop in stops:
        with TraceWriter(tmp_path / "store", writing.HEADER, shard_size=writing.SHARD) as writer:
            for number in range(stop):
                if f"s{number}" not in writer.done:
                    writer.append(writing.trace(number))
        assert len(TraceStore(tmp_path / "store")) == stop
    writing.write(tmp_path / "store")
    assert contents(tmp_path / "store") == contents(uninterrupted)


class Death(BaseException):
    """Stands in for a kill between two file operations."""


@pytest.mark.parametrize("survived", range(0, 21, 2))
def test_dying_at_any_move_leaves_the_same_bits(tmp_path, uninterrupted, monkeypatch, survived):
    calls = 0

    def replace_until(source, target):
        nonlocal calls
        calls += 1
        if calls > survived:
            raise Death
        move(source, target)

    move = os.replace
    monkeypatch.setattr(os, "replace", replace_until)
    close = TraceWriter.close
    # A killed process closes nothing; its lock goes with it.
    monkeypatch.setattr(TraceWriter, "close", lambda w: w._lock.release() if calls > survived else close(w))
    with pytest.raises(Death):
        writing.write(tmp_path / "store")
    monkeypatch.undo()
    writing.write(tmp_path / "store")
    assert contents(tmp_path / "store") == contents(uninterrupted)
    assert not list((tmp_path / "store").glob(f"{TEMPORARY}*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")
def test_killed_at_random_moments_and_resumed(tmp_path, uninterrupted):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "store"), "11"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert int(done.stdout) >= 3, "too few kills to mean anything"
    assert contents(tmp_path / "store") == contents(uninterrupted)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no record", "record broken", "no shard", "empty"])
@pytest.mark.parametrize("index", [0, 4, 9])
def test_damaged_shards_are_found_and_done_again(tmp_path, uninterrupted, damage, index):
    folder = tmp_path / "store"
    writing.write(folder)
    path = shards.shard_path(folder, index)
    whole = path.read_bytes()
    if damage == "no record":
        path.with_suffix(".json").unlink()
    elif damage == "record broken":
        path.with_suffix(".json").write_text("{")
    elif damage == "no shard":
        path.unlink()
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes({"truncated": whole[:-9], "flipped": flipped, "empty": b""}[damage])
    with pytest.raises(UserError, match=f"damaged shard-0000{index}"):
        TraceStore(folder)
    with TraceWriter(folder, writing.HEADER, shard_size=writing.SHARD) as writer:
        lost = {f"s{n}" for n in range(writing.COUNT) if n // writing.SHARD == index}
        assert writer.done == {f"s{n}" for n in range(writing.COUNT)} - lost
    writing.write(folder)
    assert contents(folder) == contents(uninterrupted)


def test_another_header_is_refused_with_all_keys(tmp_path):
    header = {"teacher": "a", "prompt": {"system": "x", "order": "image_first"}, "rows": ("question",)}
    small(tmp_path, header=header).check({"rows": ["question"], "prompt": {"order": "image_first"}})
    small(tmp_path, header=header)  # the same one opens again
    other = {"teacher": "b", "prompt": {"system": "x", "order": "question_first"}, "layers": 2}
    with pytest.raises(UserError) as error:
        TraceWriter(tmp_path, other, shard_size=2)
    for part in ("'teacher' is 'a' in the store and 'b' here", "'prompt.order'", "'rows'", "'layers' is missing"):
        assert part in str(error.value)
    assert "system" not in str(error.value)
    with pytest.raises(UserError, match="'shard_size' is 2 in the store and 3 here"):
        TraceWriter(tmp_path, header, shard_size=3)
    with pytest.raises(UserError, match="'teacher' is 'a' in the store and 'c' here"):
        TraceStore(tmp_path).check({"teacher": "c"})
    TraceWriter(tmp_path, header, shard_size=2).close()  # a refusal leaves no lock behind


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"gaze_top_k": 0}, "gaze_top_k"),
        ({"gaze_top_k": True}, "gaze_top_k"),
        ({"semantics_dtype": "float23"}, "did you mean 'float32'"),
        ({"path": Path("x")}, "plain JSON"),
        ({"epsilon": float("nan")}, "plain JSON"),
    ],
)
def test_bad_headers(tmp_path, header, message):
    with pytest.raises(UserError, match=message):
        TraceWriter(tmp_path / "store", header)


ONE_WRITER = """
import sys
from laavit.registry import UserError
from laavit.traces.store import TraceWriter

with TraceWriter(sys.argv[1], {}):
    try:
        TraceWriter(sys.argv[1], {})
    except UserError as error:
        assert "another process" in str(error)
    else:
        sys.exit("a second writer was let in")
TraceWriter(sys.argv[1], {}).close()
"""


def test_one_writer_at_a_time(tmp_path):
    # In a process of its own: a lock is a file descriptor, and what other tests leave to the garbage collector (forked
    # drivers, killed writers) may close one of the same number.
    subprocess.run([sys.executable, "-c", ONE_WRITER, str(tmp_path)], check=True)


def test_places_that_are_no_store(tmp_path):
    with pytest.raises(UserError, match="no trace store"):
        TraceStore(tmp_path / "none")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds 'thesis.tex'"):
        TraceWriter(tmp_path, {})
    with pytest.raises(UserError, match="is a file"):
        TraceWriter(tmp_path / "thesis.tex", {})
    folder = tmp_path / "store"
    small(folder)
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps(header | {"schema": 99}))
    for opened in (TraceStore, lambda path: TraceWriter(path, {"teacher": "t"}, 2)):
        with pytest.raises(UserError, match="schema 99"):
            opened(folder)
    (folder / "header.json").write_text("[]")
    with pytest.raises(UserError, match="not the header"):
        TraceStore(folder)


def test_an_empty_store(tmp_path):
    TraceWriter(tmp_path, {}).close()
    store = TraceStore(tmp_path)
    assert len(store) == 0 and list(store) == [] and store.bytes_per_sample() == 0
    with pytest.raises(UserError, match="'x'"):
        store.get("x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_id": "a"}, "already holds sample 'a'"),
        ({"sample_id": ""}, "empty sample id"),
        ({"gaze": torch.ones(5)}, r"shape \(5,\) for tiles .* \(6 tokens\)"),
        ({"gaze": torch.full((6,), float("nan"))}, "non-finite"),
        ({"gaze": -torch.ones(6)}, "negative"),
        ({"semantics": torch.ones(31)}, "31 wide, the store's 32"),
        ({"semantics": torch.ones(2, 16)}, "one vector"),
        ({"semantics": torch.full((32,), 1e6)}, "not finite as float16"),
        ({"mass": float("inf")}, "mass"),
    ],
)
def test_traces_that_do_not_fit(tmp_path, changes, message):
    with TraceWriter(tmp_path, {"semantics_dtype": "float16"}) as writer:
        writer.append(replace(writing.trace(1), sample_id="a"))
        with pytest.raises(UserError, match=message):
            writer.append(replace(writing.trace(1), **changes))
        writer.append(replace(writing.trace(1), sample_id="b"))  # and the writer goes on
    assert TraceStore(tmp_path).ids == ("a", "b")


def test_missing_traces_are_named(tmp_path):
    store = small(tmp_path)
    store.require(["a", "c"])
    with pytest.raises(UserError, match=r"lacks the traces of 4 samples: 'w', 'x', 'y', \.\.\."):
        store.require(["a", "w", "x", "y", "z"])
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}.*'nobody'"):
        store.get("nobody")


def test_verdict_columns_are_added_and_overwritten_alone(tmp_path):
    store = small(tmp_path)
    before = contents(tmp_path)
    store.write_verdicts("correctness", {"a": True, "b": False, "c": True}, {"a": 1, "b": 0.5, "c": 1})
    store.write_verdicts("alignment", dict.fromkeys("abc", True), {"a": 0.3, "b": 0.4, "c": 0.5})
    column = (tmp_path / "verdicts/correctness.arrow").read_bytes()
    store.write_verdicts("alignment", {"a": True, "b": True, "c": False}, {"a": 0.3, "b": 0.4, "c": 0.1})
    assert (tmp_path / "verdicts/correctness.arrow").read_bytes() == column
    assert all(contents(tmp_path)[name] == content for name, content in before.items())
    for opened in (store, TraceStore(tmp_path)):
        assert opened.verdicts()["alignment"] == {"a": True, "b": True, "c": False}
        assert opened.scores("correctness") == {"a": 1.0, "b": 0.5, "c": 1.0}
        assert opened.get("c").verdicts == {"correctness": True, "alignment": False}
        assert opened.get("c").scores == {"correctness": 1.0, "alignment": 0.1}
        assert opened.select(["correctness"]) == ("a", "c")
        assert opened.select(["correctness", "alignment"]) == ("a",) and opened.select([]) == ("a", "b", "c")


def test_a_written_verdict_goes_before_a_stored_one(tmp_path):
    with TraceWriter(tmp_path, {}) as writer:
        writer.append(replace(writing.trace(1), verdicts={"x": True}, scores={"x": 1.0}))
    store = TraceStore(tmp_path)
    store.write_verdicts("x", {"s1": False}, {"s1": 0.0})
    assert store[0].verdicts == {"x": False} and store[0].scores == {"x": 0.0}


def test_verdicts_that_do_not_fit(tmp_path):
    store = small(tmp_path)
    full = dict.fromkeys("abc", True)
    scores = dict.fromkeys("abc", 1.0)
    for name in ("../evil", "", ".x", "a/b"):
        with pytest.raises(UserError, match="no name"):
            store.write_verdicts(name, full, scores)
    with pytest.raises(UserError, match="missing sample 'c'"):
        store.write_verdicts("x", {"a": True, "b": True}, scores)
    with pytest.raises(UserError, match="unknown sample 'd'"):
        store.write_verdicts("x", full, scores | {"d": 1.0})
    store.write_verdicts("correctness", full, scores)
    with pytest.raises(UserError, match="did you mean 'correctness'"):
        store.select(["corectness"])
    grown = small(tmp_path, ids=("a", "b", "c", "d"))
    with pytest.raises(UserError, match="no verdict on sample 'd'"):
        grown.select(["correctness"])


def test_the_digest_names_the_content(tmp_path):
    store, twin = small(tmp_path / "a"), small(tmp_path / "b")
    assert store.digest() == twin.digest()
    assert small(tmp_path / "c", ids=("a", "b", "d")).digest() != store.digest()
    assert small(tmp_path / "d", header={"teacher": "u"}).digest() != store.digest()
    plain = store.digest()
    store.write_verdicts("x", dict.fromkeys("abc", True), dict.fromkeys("abc", 1.0))
    with_x = store.digest(["x"])
    store.write_verdicts("x", dict.fromkeys("abc", False), dict.fromkeys("abc", 1.0))
    assert store.digest() == plain and len({plain, with_x, store.digest(["x"])}) == 3


def test_bytes_of_a_sample_are_as_documented(tmp_path):
    tokens, width = 36, 512
    trace = Trace("s", "red", ((6, 6),), torch.rand(tokens), torch.randn(width), 0.5)
    for name, header, expected in (
        ("sparse", {"gaze_top_k": 8, "semantics_dtype": "float16"}, 2 * width + 8 * 8),
        ("full", {}, 4 * width + 4 * tokens),
    ):
        with TraceWriter(tmp_path / name, header, shard_size=256) as writer:
            for number in range(256):
                writer.append(replace(trace, sample_id=f"{number}"))
        assert expected < TraceStore(tmp_path / name).bytes_per_sample() < expected + 120
