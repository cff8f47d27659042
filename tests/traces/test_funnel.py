"""The funnel's counts, and the table by source beside the paper's."""

import pytest

from laavit.registry import UserError
from laavit.structures import Box
from laavit.traces.funnel import Stage, by_source, filter_names, funnel, paper_counts
from laavit.traces.grids import in_box_mass, sample_mask
from laavit.traces.store import TraceStore
from laavit.traces.summary import Figures, summarise


@pytest.fixture
def store(write):
    store = write("a", range(6))
    for name, passed in (("alignment", "s0 s1 s2"), ("correctness", "s1 s2 s3 s4"), ("difficulty", "s2 s3 s5")):
        column = {key: key in passed.split() for key in store.ids}
        store.write_verdicts(name, column, dict.fromkeys(store.ids, 0.0))
    return TraceStore(store.path)


def test_alone_and_together_in_the_paper_s_order(store):
    found = funnel(store)
    assert found.stages == (Stage("correctness", 4, 4), Stage("difficulty", 3, 2), Stage("alignment", 3, 1))
    assert found.passed == ("s2",) and found.traces == 6 and found.unjudged == {}
    assert funnel(store, ["alignment", "correctness"]).stages == (Stage("alignment", 3, 3), Stage("correctness", 4, 2))
    with pytest.raises(UserError, match=r"no verdicts of a filter 'align'.*did you mean 'alignment'"):
        funnel(store, ["align"])


def test_notes_are_no_stages():
    names = ["alignment", "b", "correctness", "correctness.judge", "a.b"]
    assert filter_names(names) == ["correctness", "alignment", "a.b", "b"]


def test_by_source_beside_the_paper(store):
    sources = {"s0": "gqa", "s1": "gqa", "s2": "cub", "s3": "mine", "s4": "gqa"}
    rows = {row.source: row for row in by_source(funnel(store), store, sources)}
    assert rows["cub"][1:] == (1, 1, 1.0, 174, 174 / 14567)
    assert rows["gqa"][1:] == (3, 0, 0.0, 2921, 2921 / 14567)
    assert rows["mine"].paper is None and rows["?"].traces == 1 and rows["vsr"].traces == 0
    assert next(iter(rows)) == "cub"


def test_the_paper_s_counts_add_up(tmp_path):
    assert sum(paper_counts().values()) == 14567 and len(paper_counts()) == 10
    file = tmp_path / "x.yaml"
    for text, message in (("paper: {total: 3, sources: {a: 1}}", "add up to 1, not to 3"), ("a: [", "does not read")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            paper_counts(file)


def test_summary_against_a_plain_computation(store):
    boxes = {"s1": [Box(0, 0, 0.5, 1)]}
    found = summarise(store, boxes)
    trace = store.get("s1")
    share = float(in_box_mass(trace.gaze.double(), sample_mask(boxes["s1"], trace.tiles).double()))
    assert found.figures["in_box"] == Figures(1, pytest.approx(share), 0.0, pytest.approx(share), pytest.approx(share))
    masses = [t.mass for t in store]
    assert found.figures["mass"].mean == pytest.approx(sum(masses) / 6)
    assert found.figures["steps"].count == sum(bool(t.steps) for t in store)
    assert (found.flat, found.unanswered, found.blind) == (0, 0, 6)
    entropies = [-(p * p.log()).sum() for t in store for p in [t.gaze.double() / t.gaze.double().sum()]]
    assert found.figures["entropy"].mean == pytest.approx(float(sum(entropies)) / 6)
    assert Figures.of([1.0, 3.0]) == Figures(2, 2.0, pytest.approx(2**0.5), 1.0, 3.0)
