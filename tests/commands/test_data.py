"""``laavit data check``: the report on a broken data set, and its mistakes in one sentence."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from laavit.cli import run
from laavit.data import VisualCoT
from laavit.data.statistics import Tokens, describe, paper

_spec = importlib.util.spec_from_file_location("corpus", Path(__file__).parents[1] / "data" / "corpus.py")
assert _spec is not None and _spec.loader is not None
corpus = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(corpus)

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return corpus.write(tmp_path_factory.mktemp("corpus"))


def flags(annotations: Path, root: Path) -> list[str]:
    return ["--data", "visual_cot", "--data.annotations", str(annotations), "--data.root", str(root)]


@pytest.mark.parametrize("images", ["none", "header", "full"])
def test_a_broken_set_is_reported_whole(written: Any, tmp_path: Path, capsys: Capture, images: str) -> None:
    out = tmp_path / "report.json"
    words = flags(written.annotations, written.root)
    assert run("data", ["check", *words, "--images", images, "--json", str(out)]) == 0
    text, report = capsys.readouterr().out, json.loads(out.read_text())
    assert all(part in text for part in ("Table A3", "Table A4", "flickr30k", "4681", "13.58", "quarantine: box"))
    assert "[x1, y1, x2, y2]" in text, "brackets are no markup"
    counts = {kind: found["records"] for kind, found in report["quarantined"].items()}
    assert sum(counts.values()) + report["samples"] == report["records"] and counts["duplicate"] == 1
    assert report["sources"]["gqa"] == 1 and sum(report["sources"].values()) == report["samples"]
    decoded = {"cut short", "JPEG cut short"}  # what a header does not tell
    wanted = {"none": None, "header": len(corpus.IMAGES) - len(decoded), "full": len(corpus.IMAGES)}[images]
    assert report["images"].get("broken") == wanted == report["images"].get("samples_affected")


def test_boxes_and_statistics_equal_a_plain_count(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for name, size in (("a.png", (100, 50)), ("b.png", (300, 40))):
        Image.new("RGB", size).save(root / name)
    boxes = [[0, 0, 1, 1], [0.5, 0.5, 0.51, 0.51], [0, 0, 1.005, 0.5]]
    records = [
        corpus.two(1, path="a.png", bboxes=boxes, conversations=corpus.talk("one two  three?", "a b")),
        corpus.two(2, path="b.png", bboxes=[], conversations=corpus.talk("one", "a")),
        corpus.two(3, image=["b.png###[30, 10, 303, 40]"], bboxes=None),
        corpus.two(4, image=["a.png", "b.png###[0, 0, 3, 3]"], bboxes=None, dataset="vsr"),
    ]
    file = tmp_path / "x.json"
    file.write_text(json.dumps(records))
    tokens = Tokens(patch=14, merge=2, min_pixels=28 * 28, max_pixels=10**9)
    report = describe(VisualCoT(file, root), tokens=tokens)
    assert report["boxes"] == {
        "boxes": 5,
        "samples_without": 1,
        "samples_with_several": 1,
        "in_pixels": 2,
        "reach_past_the_image": 2,
        "without_area_inside": 0,
        "smaller_than_0.1%": 2,
        "larger_than_95%": 1,
    }
    found = report["statistics"]
    assert found["question_words"] == (3 + 1 + 5 + 5) / 4 and found["question_words_max"] == 5
    assert found["answer_words"] == (2 + 1 + 2 + 2) / 4
    assert found["image_width"] == np.mean([100, 300, 300, 100, 300])  # a sample's every image
    assert found["visual_tokens"] == pytest.approx(np.mean([4 * 2, 11 * 1, 11 * 1, 4 * 2, 11 * 1]))
    assert report["sources"] == {"flickr30k": 3, "vsr": 1}
    unseen = describe(VisualCoT(file, root), images="none")
    assert unseen["boxes"]["reach_past_the_image"] == 1 and "image_width" not in unseen["statistics"]


@pytest.mark.slow  # a fresh process imports torch
def test_worker_processes_find_the_same(written: Any) -> None:
    reader = VisualCoT(written.annotations, written.root)
    assert describe(reader, "full", workers=1) == describe(reader, "full")


def test_tokens_of_odd_shapes() -> None:
    sizes = np.array([[280, 280], [1, 1], [10_000, 10]])
    assert Tokens(min_pixels=1, max_pixels=10**9).count(sizes).tolist() == [100, 1, 0]
    assert Tokens().count(np.array([[100, 100], [4000, 4000]])).tolist() == [256, 1225]


def test_the_papers_figures_add_up() -> None:
    figures = paper()
    assert sum(figures["sources"].values()) == figures["total"] == 14_567
    assert figures["statistics"]["visual_tokens"] == 697.73


def test_a_recipe_and_its_flags(own_project: Path, capsys: Capture) -> None:
    assert run("data", ["check", str(own_project), "--data.limit", "2"]) == 0
    assert "6 records, 2 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs a recipe, or --data NAME"),
        (["/absent.py"], "no recipe at '/absent.py'"),
        (["--data", "visual_cto", "--data.annotations", "x", "--data.root", "y"], "did you mean 'visual_cot'"),
        (["--data", "visual_cot", "--data.annotations", "x", "--data.root", "/absent"], "'/absent' does not exist"),
        (["--images", "all"], "--images"),
        (["--workers", "-1"], "--workers: got -1"),
        (["--min-pixels", "9", "--max-pixels", "3"], "--max-pixels at least"),
    ],
)
def test_mistakes_are_one_sentence(capsys: Capture, words: list[str], message: str) -> None:
    assert run("data", ["check", *words]) == 2
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in err and not out and err.count("error: ") == 1


def test_actions(capsys: Capture) -> None:
    assert run("data", ["chekc"]) == 2 and "did you mean 'check'" in capsys.readouterr().err
    assert run("data", ["--help"]) == 0 and "data check" in capsys.readouterr().out
