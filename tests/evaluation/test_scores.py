"""Micro, macro, pairs and the rest against figures worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from laavit.evaluation.benchmarks import benchmark, benchmarks
from laavit.evaluation.records import make_records, summarise
from laavit.evaluation.scores import by_group, scores
from laavit.registry import UserError


def record(task: str, right: int, **groups: str) -> dict[str, Any]:
    return {"task": task, "id": "0", "prediction": "", "target": "", "correct": bool(right), "groups": groups}


def test_pairs_are_right_together_and_incomplete_ones_left_out() -> None:
    records = [record("mmvp", right, pair=pair) for right, pair in zip((1, 1, 1, 0, 1), "00112")]
    assert scores(records, "mmvp") == {"micro": 4 / 5, "pair": 1 / 2}  # labels of ids 99 ... are not among them


def test_labels_put_back() -> None:
    """Right with today's label is wrong with the original one; no letter read is wrong with both."""
    answers = {"1": (1, "A"), "99": (1, "B"), "100": (0, "B"), "279": (0, None), "280": (1, "A")}
    records = [record("mmvp", right, pair="0") | {"id": i, "read": read} for i, (right, read) in answers.items()]
    found = scores(records, "mmvp")
    assert (found["micro"], found["original_labels"]) == (3 / 5, 2 / 5)


def test_means_over_axes_and_over_nested_groups() -> None:
    mmstar = [("coarse perception", "a", 1)] * 3 + [("coarse perception", "b", 0), ("math", "c", 1), ("math", "c", 0)]
    found = scores([record("mmstar", r, category=c, l2_category=axis) for c, axis, r in mmstar], "mmstar")
    assert found["micro"] == 4 / 6
    assert found["macro"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["macro_capabilities"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    cv = [("2D", "ADE20K", 1), ("2D", "COCO", 0), ("2D", "COCO", 0), ("3D", "Omni3D", 1)]
    found = scores([record("cv_bench", r, type=t, source=s) for t, s, r in cv], "cv_bench")
    assert found == {"micro": 2 / 4, "macro": ((1 + 0) / 2 + 1) / 2, "2D": 0.5, "3D": 1.0}


def test_questions_and_figures_of_hallusion_bench() -> None:
    rows = [(1, "q0", "f0"), (0, "q0", "f1"), (1, "q1", "f0"), (1, "q1", "f1")]
    records = [record("hallusion_bench_image", r, category="VD", question=q, figure=f) for r, q, f in rows]
    assert scores(records, "hallusion_bench_image") == {"micro": 0.75, "macro": 0.75, "pair": 0.5, "figure": 0.5}


def test_yes_and_no_of_pope() -> None:
    answers = [("yes", "yes"), ("yes", "no"), ("yes", None), ("no", "yes"), ("no", "no"), ("no", None)]
    records = [record("pope_adv", gold == said) | {"target": gold, "read": said} for gold, said in answers]
    found = scores(records, "pope_adv")
    assert found == pytest.approx({"micro": 2 / 6, "precision": 1 / 2, "recall": 1 / 3, "f1": 0.4, "yes_ratio": 2 / 6})
    silent = [record("pope_adv", 0) | {"target": "yes", "read": None}]
    assert scores(silent, "pope_adv") == {"micro": 0, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}


def test_groups_of_benchmarks_and_other_tasks() -> None:
    records = [record("blink_jigsaw", 1), record("blink_jigsaw", 1), record("blink_counting", 0), record("mmvp", 0)]
    assert scores(records, "blink") == {"micro": 2 / 3, "macro": 1 / 2}
    assert scores([record("microlab_test", 1)], "microlab_test") == {"micro": 1.0}
    assert scores([], "mmvp") == {} == scores(records, "mmstar")
    assert by_group(records, "pair") is None


def test_what_older_records_lack_is_not_made_up() -> None:
    records = [{"task": "mmvp", "id": "1", "prediction": "A", "target": "A", "correct": True}]
    assert scores(records, "mmvp") == {"micro": 1.0}
    assert "figures" not in summarise([record("microlab_test", 1)])["microlab_test"]


def test_records_keep_groups_and_what_was_read() -> None:
    columns = ("Index", "Question", "Options", "Correct Answer")
    judged = {"is_correct": False, "pred_letter": ""}
    sample = {"doc_id": 0, "doc": dict.fromkeys(columns, 100), "filtered_resps": ["?"], "target": "A", "acc": judged}
    [made] = make_records("mmvp", [sample], ["acc"], {})
    assert (made["groups"], made["read"], made["correct"]) == ({"pair": "49"}, None, False)
    assert summarise([made])["mmvp"]["unread"] == 1
    with pytest.raises(UserError, match="'mmvp' have no column 'Index'"):
        make_records("mmvp", [sample | {"doc": {"Question": ""}}], ["acc"], {})


def test_a_question_has_the_same_id_however_many_are_asked() -> None:
    """POPE counts its questions anew in each part: among the first ones alone these numbers are unique."""
    documents = [{"question_id": number, "category": kind} for kind in ("random", "popular") for number in (1, 2)]
    samples = [
        {"doc_id": i, "doc": doc, "filtered_resps": ["?"], "target": "A", "acc": 1} for i, doc in enumerate(documents)
    ]
    everything = make_records("t", samples, ["acc"], {}, whole=documents)
    some = make_records("t", samples[:2], ["acc"], {}, whole=documents)
    assert [record["id"] for record in everything] == ["0", "1", "2", "3"] and some == everything[:2]


def test_the_registry_is_whole() -> None:
    names = benchmarks()
    assert sum(names[name].questions for name in names["blink"].members) == names["blink"].questions == 1901
    parts = ("vstar_bench_direct_attributes", "vstar_bench_relative_position")
    assert sum(names[name].questions for name in parts) == names["vstar_bench"].questions
    columns = [entry.column for entry in names.values() if entry.column]
    assert columns == ["MMVP", "V* attr", "IQ-Test", "RelDepth", "RelRefl", "Spatial", "MMStar"]
    assert {name for entry in names.values() for name in entry.members} <= names.keys()
    with pytest.raises(UserError, match="did you mean 'mmvp'"):
        benchmark("mvp")
