"""A part of a store holds the same traces and verdicts; other formats hold the same figures."""

import json
import math
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from laavit.registry import UserError
from laavit.traces.diff import compare
from laavit.traces.export import export_jsonl, export_parquet, export_store
from laavit.traces.gaze import top_k
from laavit.traces.store import TraceStore, verify


@pytest.fixture
def store(write):
    store = write("whole", range(10), quarantined=[4])
    passed = {key: int(key[1:]) % 2 == 0 for key in store.ids}
    store.write_verdicts("correctness", passed, {key: float(value) for key, value in passed.items()})
    store.write_verdicts("alignment", passed, dict.fromkeys(store.ids, math.nan))
    return TraceStore(store.path)


def test_a_subset_keeps_traces_verdicts_and_order(store, tmp_path):
    new = export_store(store, tmp_path / "out", ["s8", "s1", "s2"], selected={"select": ["x"]})
    assert new.ids == ("s1", "s2", "s8") and verify(new.path) == {}
    found = compare(store, new)
    assert found.same == found.common == 3 and not found.verdicts
    assert new.scores("correctness") == {"s1": 0.0, "s2": 1.0, "s8": 1.0}
    assert new.header["exported"] == {"from": store.digest(), "traces": 9, "select": ["x"]}
    assert new.select(["correctness"]) == ("s2", "s8")
    assert {k: v for k, v in new.header.items() if k != "exported"} == store.header


def test_smaller_maps_and_semantics(store, tmp_path):
    new = export_store(store, tmp_path / "out", store.ids, top_k=2, semantics_dtype="float16")
    assert new.header["gaze_top_k"] == 2 and new.bytes_per_sample() < store.bytes_per_sample()
    for key in store.ids:
        old, small = store.get(key), new.get(key)
        assert torch.equal(small.gaze, top_k(old.gaze, 2))
        assert all(torch.equal(s.gaze, top_k(o.gaze, 2)) for s, o in zip(small.steps, old.steps, strict=True))
        assert torch.equal(small.semantics, old.semantics.half().float())
        assert small.answer == old.answer and small.mass == old.mass
    with pytest.raises(UserError, match="keeps 2 tokens of a map; --top-k 3 cannot"):
        export_store(new, tmp_path / "again", new.ids, top_k=3)


def test_what_cannot_be_exported_is_said(store, tmp_path):
    with pytest.raises(UserError, match=r"no trace of '.*whole' is left to export: 9 traces, none selected"):
        export_store(store, tmp_path / "out", [])
    with pytest.raises(UserError, match=r"sample 's4'.*put aside: broken image"):
        export_store(store, tmp_path / "out", ["s1", "s4"])
    with pytest.raises(UserError, match="semantics_dtype is 'int8'"):
        export_store(store, tmp_path / "out2", ["s1"], semantics_dtype="int8")
    with pytest.raises(UserError, match="not empty"):
        export_store(store, store.path, ["s1"])


def test_parquet_and_json_lines_hold_the_same_figures(store, tmp_path):
    export_parquet(store, tmp_path / "t.parquet", store.ids)
    export_jsonl(store, tmp_path / "t.jsonl", store.ids)
    rows = pq.read_table(tmp_path / "t.parquet").to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == lines and [row["sample_id"] for row in rows] == list(store.ids)
    for row in rows:
        trace = store.get(row["sample_id"])
        assert torch.equal(torch.tensor(row["gaze"]), trace.gaze)
        assert torch.equal(torch.tensor(row["semantics"][0]), trace.semantics)
        assert [step["text"] for step in row["steps"]] == [step.text for step in trace.steps]
        assert row["verdict.correctness"] == trace.verdicts["correctness"] and row["score.alignment"] is None
        assert [(t["height"], t["width"], t["image"]) for t in row["tiles"]] == [
            (t.height, t.width, t.image) for t in trace.tiles
        ]
    assert json.loads(pq.read_schema(tmp_path / "t.parquet").metadata[b"laavit"]) == store.header
    loaded = load_dataset("parquet", data_files=str(tmp_path / "t.parquet"), split="train")
    assert loaded["answer"][:] == [trace.answer for trace in store]


def test_verdicts_of_a_row_of_its_own_stay_with_it(write, tmp_path, traces):
    """What a trace was stored with, and what a filter wrote beside it, are told apart."""
    from laavit.traces.store import TraceWriter

    with TraceWriter(tmp_path / "a", {}) as writer:
        writer.append(replace(traces(1), verdicts={"own": True}, scores={"own": 0.5}))
    store = TraceStore(tmp_path / "a")
    store.write_verdicts("column", {"s1": False}, {"s1": 0.0})
    new = export_store(TraceStore(tmp_path / "a"), tmp_path / "b", ["s1"])
    assert list(new.verdicts()) == ["column"]
    assert new.get("s1").verdicts == {"own": True, "column": False}
