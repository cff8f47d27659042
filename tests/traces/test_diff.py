"""What two stores say differently, down to a bit."""

import math
from dataclasses import replace

import pytest
import torch

from laavit.traces.diff import compare, divergence
from laavit.traces.store import TraceStore, TraceWriter


def other(store, tmp_path, traces, changes, numbers=range(6), **header):
    with TraceWriter(tmp_path / "other", {**store.header, **header}, 4) as writer:
        for number in numbers:
            writer.append(replace(traces(number), **changes.get(number, {})))
    return TraceStore(tmp_path / "other")


def test_equal_stores_are_equal(write, tmp_path, traces):
    store = write("a", range(6))
    found = compare(store, other(store, tmp_path, traces, {}))
    assert found.equal and found.same == found.common == 6
    assert max(found.gaze_kl.values()) == 0 and min(found.cosine.values()) == pytest.approx(1)


@pytest.mark.parametrize("change", ["answer", "blind_answer", "mass", "gaze", "semantics", "steps", "tiles"])
def test_one_changed_thing_is_found(write, tmp_path, traces, change):
    trace = traces(5)
    bumped = trace.gaze.clone()
    bumped[0] = torch.nextafter(bumped[0], torch.tensor(2.0))
    value = {
        "answer": "x",
        "blind_answer": None,
        "mass": 0.25,
        "gaze": bumped,
        "semantics": -trace.semantics,
        "steps": (replace(trace.steps[0], group="attribute"),),
        "tiles": (replace(trace.tiles[0], height=3, width=2),),
    }[change]
    store = write("a", range(6))
    found = compare(store, other(store, tmp_path, traces, {5: {change: value}}))
    assert not found.equal and found.same == 5 and not found.header
    assert found.answers == (["s5"] if change == "answer" else [])
    assert found.tiles == (["s5"] if change == "tiles" else [])
    assert found.steps == (["s5"] if change == "steps" else [])
    if change == "semantics":
        assert found.cosine["s5"] == pytest.approx(-1)
    if change == "gaze":
        assert 0 < found.gaze_abs["s5"] < 1e-6


def test_samples_headers_verdicts(write, tmp_path, traces):
    store = write("a", range(6))
    new = other(store, tmp_path, traces, {}, numbers=range(2, 8), teacher="big")
    store.write_verdicts("c", dict.fromkeys(store.ids, True), dict.fromkeys(store.ids, 1.0))
    new.write_verdicts("c", {key: key != "s3" for key in new.ids}, dict.fromkeys(new.ids, 1.0))
    found = compare(TraceStore(store.path), TraceStore(new.path))
    assert found.only == (["s0", "s1"], ["s6", "s7"]) and found.common == 4
    assert found.header == ["'teacher' is 'tiny' in the first and 'big' in the second"]
    assert found.verdicts == {"c": ["s3"]} and not found.equal


def test_divergence_against_the_formula():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([2.0, 1.0, 1.0])
    assert divergence(p, q) == pytest.approx(0, abs=1e-12)
    q = torch.tensor([0.1, 0.1, 0.8])
    expected = 0.5 * math.log(5) + 0.25 * math.log(2.5) + 0.25 * math.log(0.25 / 0.8)
    assert divergence(p, q) == pytest.approx(expected, rel=1e-6)
    assert math.isnan(divergence(p, torch.zeros(3))) and divergence(torch.zeros(3), torch.zeros(3)) == 0
