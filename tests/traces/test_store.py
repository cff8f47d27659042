"""The trace store: round trip, sizes, damage, headers, holes, verdict columns."""

import importlib.util
import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import load_dataset

from laavit.registry import UserError
from laavit.structures import Step, Tile, Trace
from laavit.traces import shards
from laavit.traces.gaze import top_k
from laavit.traces.store import TraceStore, TraceWriter, verify

SCRIPT = Path(__file__).with_name("writing.py")
_spec = importlib.util.spec_from_file_location("writing", SCRIPT)
assert _spec is not None and _spec.loader is not None
writing = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(writing)
contents = writing.contents
KEPT = tuple(f"s{n}" for n in range(writing.COUNT) if n % 7 != 6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return writing.write(tmp_path_factory.mktemp("whole") / "store").path


def small(path, ids=("a", "b", "c"), header=None, size=2):
    with TraceWriter(path, header or {"teacher": "t"}, shard_size=size) as writer:
        for number, key in enumerate(ids):
            writer.append(replace(writing.trace(number), sample_id=key))
    return TraceStore(path)


def same(first: Trace, second: Trace) -> bool:
    plain = ("sample_id", "answer", "tiles", "mass", "blind_answer", "verdicts", "scores")
    steps = [[(step.text, step.group, step.gaze.tolist()) for step in trace.steps] for trace in (first, second)]
    tokens = [None if t.semantic_tokens is None else t.semantic_tokens.tolist() for t in (first, second)]
    tensors = all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("gaze", "semantics"))
    equal = all(getattr(first, name) == getattr(second, name) for name in plain)
    return tensors and equal and steps[0] == steps[1] and tokens[0] == tokens[1]


def test_full_maps_come_back_bit_for_bit(tmp_path):
    given = replace(writing.trace(3), verdicts={"kept": True, "not": False}, scores={"kept": 0.25})
    others = [writing.trace(n) for n in (0, 4, 5, 8, 10)] + [writing.trace(n, rows=2) for n in (12, 13, 20)]
    with TraceWriter(tmp_path, {}, shard_size=4) as writer:
        writer.append(given)
        writer.extend(others)
    store = TraceStore(tmp_path)
    assert all(map(same, store, [given, *others])) and len(store) == 9
    assert {trace.blind_answer for trace in store} == {None, "", "guess 5"}
    assert [len(trace.steps) for trace in store] == [0, 3, 3, 0, 3, 0, 3, 0, 3]
    assert same(store[-1], store[8]) and same(store.get("s3"), given)
    assert store.header == {"gaze_top_k": None, "semantics_dtype": "float32"}
    assert "s3" in store and "s9" not in store and verify(tmp_path) == {}


def test_one_row_of_semantics_is_not_a_pooled_one(tmp_path):
    with TraceWriter(tmp_path, {}) as writer:
        writer.append(writing.trace(1, rows=1))
        writer.append(writing.trace(2))
    store = TraceStore(tmp_path)
    assert store[0].semantics.shape == (1, 32) and store[0].semantic_tokens.shape == (1,)
    assert store[1].semantics.shape == (32,) and store[1].semantic_tokens is None


def test_sparse_maps_come_back_dense(whole):
    store = TraceStore(whole)
    assert store.ids == KEPT and store.planned == writing.COUNT
    for place in (0, 1, 50, 56, len(KEPT) - 1):
        trace, original = store[place], writing.trace(int(KEPT[place][1:]))
        assert torch.equal(trace.gaze, top_k(original.gaze, 4)) and trace.gaze.dtype == torch.float32
        assert torch.equal(trace.semantics, original.semantics.half().float())
        assert [torch.equal(s.gaze, top_k(o.gaze, 4)) for s, o in zip(trace.steps, original.steps, strict=True)] == [
            True
        ] * len(original.steps)
        assert trace.tiles == original.tiles and trace.answer == original.answer


def test_semantics_in_sixteen_bits(tmp_path):
    for dtype in ("float16", "bfloat16"):
        with TraceWriter(tmp_path / dtype, {"semantics_dtype": dtype}) as writer:
            writer.append(writing.trace(1, rows=2))
        found = TraceStore(tmp_path / dtype)[0].semantics
        assert found.dtype == torch.float32
        assert torch.equal(found, writing.trace(1, rows=2).semantics.to(getattr(torch, dtype)).float())


def test_quarantined_samples_are_told_with_their_reason(whole):
    store = TraceStore(whole)
    assert set(store.quarantined) == {f"s{n}" for n in range(writing.COUNT) if n % 7 == 6}
    assert store.quarantined["s13"] == "no image 13" and "s13" not in store
    with pytest.raises(UserError, match=r"'s13'.*put aside: no image 13"):
        store.get("s13")
    store.require(["s1", "s2"])


def test_a_shard_of_nothing_but_quarantined_samples(tmp_path):
    with TraceWriter(tmp_path, {}, shard_size=2) as writer:
        writer.append(writing.trace(1))
        for key in "abc":
            writer.quarantine(key, "broken")
        writer.append(writing.trace(2))
        writer.quarantine("d", "broken")
    store = TraceStore(tmp_path)
    assert store.ids == ("s1", "s2") and list(store.quarantined) == ["a", "b", "c", "d"]
    assert same(store[1], writing.trace(2)) and verify(tmp_path) == {}


def test_datasets_reads_the_shards(whole):
    files = sorted(str(path) for path in whole.glob("shard-*.arrow"))
    found = load_dataset("arrow", data_files=files, split="train", cache_dir=str(whole.parent / "cache"))
    assert tuple(found["sample_id"]) == KEPT and found[0]["mass"] == 0.0 and found[0]["tiles"] == [2, 3, 0, 4, 1, 1]


def test_reading_gives_copies(tmp_path):
    store = small(tmp_path)
    for tensor in (store[0].gaze, store[0].semantics, store[0].steps[0].gaze):
        tensor.zero_()
    assert all(float(t.abs().sum()) > 0 for t in (store[0].gaze, store[0].semantics, store[0].steps[0].gaze))


def test_a_store_travels_to_a_worker_process(whole):
    store = TraceStore(whole)
    assert store[3].gaze.sum() > 0
    packed = pickle.dumps(store)
    assert len(packed) < 40_000  # the columns stay where they are
    assert same(pickle.loads(packed).get("s5"), store.get("s5"))  # noqa: S301


def spoil(folder, index, damage):
    """Damage one shard."""
    path = shards.shard_path(folder, index)
    whole = path.read_bytes()
    if damage == "no record":
        path.with_suffix(".json").unlink()
    elif damage == "record broken":
        path.with_suffix(".json").write_text("{")
    elif damage == "no shard":
        path.unlink()
    elif damage == "gone":
        shards.drop_shard(folder, index)
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes({"truncated": whole[:-9], "flipped": flipped, "empty": b""}[damage])


SAID = {
    "truncated": "truncated",
    "flipped": "changed",
    "no record": "unfinished",
    "record broken": "its record cannot be read",
    "no shard": "its file is missing",
    "empty": "truncated",
    "gone": "missing",
}


@pytest.mark.parametrize("damage", SAID)
@pytest.mark.parametrize("index", [0, 4, 9])
def test_damaged_shards_are_found(tmp_path, damage, index):
    folder = writing.write(tmp_path / "store").path
    spoil(folder, index, damage)
    with pytest.raises(UserError, match=rf"lacks 1 of its 10 shards: shard-0000{index}.arrow \({SAID[damage]}"):
        TraceStore(folder)
    (name, what), *others = verify(folder).items()
    assert not others and name == f"shard-0000{index}.arrow" and SAID[damage] in what
    store = TraceStore(folder, complete=False)
    assert list(store.missing) == [index] and SAID[damage] in store.missing[index]
    assert store.ids == tuple(key for key in KEPT if int(key[1:]) // writing.SHARD != index)
    assert store.planned == writing.COUNT and store[-1].sample_id == store.ids[-1]


def test_verify_finds_what_hashes_do_not(tmp_path, whole):
    folder = writing.write(tmp_path / "store").path
    shards.copy_shard(folder, folder, 3)
    assert verify(folder) == {} and contents(folder) == contents(whole)
    for suffix in (".arrow", ".json"):
        (folder / f"shard-00012{suffix}").write_bytes((folder / f"shard-00001{suffix}").read_bytes())
        (folder / f"shard-00004{suffix}").write_bytes((folder / f"shard-00001{suffix}").read_bytes())
    found = verify(folder)
    assert set(found) == {"shard-00004.arrow", "shard-00012.arrow"}
    assert "is in shard-00001.arrow too" in found["shard-00004.arrow"] and "beyond the 10" in found["shard-00012.arrow"]
    with pytest.raises(UserError, match="holds sample 's16' twice"):
        TraceStore(folder)
    spoil(folder, 9, "no record")
    assert set(verify(folder)) == {"shard-00004.arrow", "shard-00009.arrow", "shard-00012.arrow"}
    with pytest.raises(UserError, match="no trace store"):
        verify(tmp_path)


def test_a_short_or_swapped_shard_is_found(tmp_path):
    with TraceWriter(tmp_path / "store", {}, shard_size=3) as writer:
        writer.extend(writing.trace(n) for n in range(6))
    features, digest = shards.Shard, shards.ids_digest(["s3", "s4", "s5"])
    assert features(shards.shard_path(tmp_path / "store", 1)).ids() == ["s3", "s4", "s5"]
    from laavit.traces.schema import encode, trace_features

    rows = [encode(writing.trace(n), None, "float32") for n in (3, 5, 4)]
    shards.write_shard(tmp_path / "store", 1, rows, trace_features("float32"), digest)
    assert "other samples" in verify(tmp_path / "store")["shard-00001.arrow"]
    shards.write_shard(tmp_path / "store", 1, rows[:2], trace_features("float32"), digest)
    assert "holds 2 traces" in verify(tmp_path / "store")["shard-00001.arrow"]


def test_a_recipe_that_expects_another_store_is_refused(tmp_path):
    header = {"teacher": "a", "prompt": {"system": "x", "order": "image_first"}, "rows": ("question",)}
    store = small(tmp_path, header=header)
    store.check({"rows": ["question"], "prompt": {"order": "image_first"}})
    with pytest.raises(UserError) as error:
        store.check({"teacher": "b", "prompt": {"order": "question_first"}, "rows": ["answer"], "layers": 2})
    for part in ("'teacher' is 'a' in the store and 'b' here", "'prompt.order'", "'rows'", "'layers' is missing"):
        assert part in str(error.value)
    assert "system" not in str(error.value)


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
    folder = small(tmp_path / "store").path
    with pytest.raises(UserError, match="not empty"):
        TraceWriter(folder, {"teacher": "t"}, 2)
    header = json.loads((folder / "header.json").read_text())
    for version, said in ((1, "schema 1, written by an earlier version.*reads schema 2"), (99, "schema 99; this")):
        (folder / "header.json").write_text(json.dumps(header | {"schema": version}))
        with pytest.raises(UserError, match=said):
            TraceStore(folder)
    for broken in ("[]", "{", json.dumps(header | {"samples": 3}), json.dumps(header | {"header": 3})):
        (folder / "header.json").write_text(broken)
        with pytest.raises(UserError, match="not the header"):
            TraceStore(folder)


def test_a_writer_that_fails_leaves_no_store(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), TraceWriter(tmp_path, {}) as writer:
        writer.append(writing.trace(1))
        raise RuntimeError("stop")
    with pytest.raises(UserError, match="no trace store"):
        TraceStore(tmp_path)


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
        ({"semantics": torch.ones(31)}, "31 wide, those of the store 32"),
        ({"semantics": torch.ones(2, 16)}, "one vector"),
        ({"semantics": torch.ones(32), "semantic_tokens": torch.tensor([1])}, r"\[M, D\]"),
        ({"semantics": torch.ones(2, 32), "semantic_tokens": torch.tensor([1])}, r"\[M, D\]"),
        ({"semantics": torch.ones(1, 32), "semantic_tokens": torch.tensor([6])}, "token 6, and 6 image tokens"),
        ({"semantics": torch.ones(1, 32), "semantic_tokens": torch.tensor([-1])}, "image tokens"),
        ({"steps": (Step("a", "", torch.ones(5)),)}, r"step's gaze of shape \(5,\)"),
        ({"steps": (Step("a", "", -torch.ones(6)),)}, "step's gaze map with negative"),
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
    grown = small(tmp_path / "grown", ids=("a", "b", "c", "d"))
    (tmp_path / "verdicts").rename(grown.path / "verdicts")
    with pytest.raises(UserError, match="no verdict on sample 'd'"):
        TraceStore(grown.path).select(["correctness"])


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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("k", [None, 8])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("parts", [False, True])
def test_bytes_of_a_sample_are_as_documented(tmp_path, dtype, k, rows, steps, parts):
    count, tokens, width = 64, 36, 128
    region = (0.0, 0.0, 0.5, 1.0) if parts else (0.0, 0.0, 1.0, 1.0)
    tiles = (Tile(4, 6, 0, region), Tile(3, 4, 1))
    trace = Trace(
        "s000",
        "red",
        tiles,
        torch.rand(tokens),
        torch.randn((rows, width) if rows else width),
        0.5,
        torch.arange(rows) if rows else None,
        tuple(Step("word", "object", torch.rand(tokens)) for _ in range(steps)),
        "blue",
    )
    with TraceWriter(tmp_path, {"gaze_top_k": k, "semantics_dtype": dtype}, shard_size=count) as writer:
        for number in range(count):
            writer.append(replace(trace, sample_id=f"s{number:03d}"))
    maps = (8 * k if k else 4 * tokens) * (steps + 1)
    states = (4 if dtype == "float32" else 2) * max(rows, 1) * width + 4 * rows
    texts = len("s000redblue") + steps * len("wordobject")
    documented = states + maps + 12 * 2 + (32 * 2 if parts else 0) + 76 + 8 * steps + texts
    measured = (count * TraceStore(tmp_path).bytes_per_sample() - 5050) / count
    assert abs(measured - documented) < 2, (measured, documented)
