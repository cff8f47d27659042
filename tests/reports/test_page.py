"""The page: self-contained, complete, honest about what is missing, and equal to table.md in its figures."""

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from laavit.registry import UserError
from laavit.reports import build_page, write_table

LABELS = ["Base", "Naive SFT", "LaViT"]
VOID = {"meta", "link", "img", "br", "use", "path"}


class Outline(HTMLParser):
    """Collects what a page loads, its ids and its text, and checks that its elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [given[key] or "" for key in ("src", "href", "xlink:href") if key in given]
        self.ids += [given["id"] or ""] if "id" in given else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def outline(page: Path) -> Outline:
    parser = Outline()
    parser.feed(page.read_text(encoding="utf-8"))
    assert not parser.open
    return parser


def test_the_page_stands_alone(make_runs: Callable[[], list[Path]], tmp_path: Path) -> None:
    page = build_page(make_runs(), tmp_path / "deep" / "page.html", labels=LABELS, notes=["Gaze grounded with boxes."])
    found = outline(page)
    assert [load for load in found.loads if not load.startswith(("data:", "#"))] == []
    assert len(found.ids) == len(set(found.ids)), "two inline figures share an id"
    assert "@import" not in page.read_text() and "<script" not in page.read_text()
    assert list(page.parent.iterdir()) == [page], "the temporary file was left behind"
    # a page is handed on: it names no folder of the machine it was made on
    assert str(tmp_path) not in page.read_text()


def test_the_page_says_everything(make_runs: Callable[[], list[Path]], tmp_path: Path) -> None:
    page = build_page(make_runs(), tmp_path / "page.html", labels=LABELS, notes=["Gaze grounded with boxes."])
    text = " ".join(outline(page).text)
    for wanted in (
        "LaViT answers 71.2 % of 240 questions, Naive SFT 56.2 %",
        "LaViT, latents off − LaViT",
        "answer loss (next token)",
        "gate γ(t) (Eq. 5)",
        "What colour is the circle in the marked cell?",
        "student latents",
        "% in the frame",
        "salient regions",
        "How to read this page",
        "Gaze grounded with boxes.",
        "tools/train.py model_zoo/microlab/cfg.py",
        "packages.transformers",
        "800a559",
        "recipe (SHA-256)",
    ):
        assert wanted in text, wanted
    # 3 samples, each with the plain image and three maps, and the box on every one of them
    assert page.read_text().count("data:image/jpeg") == 12
    assert page.read_text().count("<b style='left:") == 12


def test_markdown_carries_the_page_s_figures(make_runs: Callable[[], list[Path]], tmp_path: Path) -> None:
    runs = make_runs()
    page = " ".join(outline(build_page(runs, tmp_path / "page.html", labels=LABELS)).text)
    table = write_table(runs, tmp_path / "table.md", labels=LABELS).read_text(encoding="utf-8")
    figures = re.findall(r"[-+]?\d+\.\d+", table)
    assert len(figures) > 60
    assert [figure for figure in figures if figure not in page] == []


def test_the_same_runs_give_the_same_page(make_runs: Callable[[], list[Path]], tmp_path: Path) -> None:
    runs = make_runs()
    first = build_page(runs, tmp_path / "a.html").read_bytes()
    assert build_page(runs, tmp_path / "b.html").read_bytes() == first


def test_every_absence_is_said(make_runs: Callable[[], list[Path]], tmp_path: Path) -> None:
    base, naive, lavit = make_runs()
    shutil.rmtree(lavit / "gaze")
    shutil.rmtree(naive / "eval")
    for run in (naive, lavit):
        (run / "log.jsonl").unlink()
        (run / "environment.json").unlink()
        (run / "recipe.json").unlink()
    text = " ".join(outline(build_page([base, naive, lavit], tmp_path / "page.html")).text)
    assert "No run holds a gaze/ folder" in text
    assert "No run holds a log.jsonl" in text
    assert "naive: no evaluation records in the folder" in text
    assert "No run holds an environment.json or a recipe.json" in text
    assert "base, naive and lavit: no recipe.json" in text


def test_text_of_users_is_escaped(make_runs: Callable[[], list[Path]], tmp_path: Path) -> None:
    runs = make_runs()
    index = runs[2] / "gaze" / "index.json"
    samples = json.loads(index.read_text())
    samples[0]["question"] = "<script>alert(1)</script>"
    index.write_text(json.dumps(samples))
    page = build_page(runs, tmp_path / "page.html", title="<b>", labels=["<i>", "b", "c"]).read_text()
    assert "<script>" not in page and "<i>" not in page.replace("<i style", "") and "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("labels", "message"), [(["a"], "1 labels for 3 runs"), (["a", "a", "b"], "two runs are called 'a'")]
)
def test_labels_are_checked(
    make_runs: Callable[[], list[Path]], tmp_path: Path, labels: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_page(make_runs(), tmp_path / "page.html", labels=labels)
    assert not (tmp_path / "page.html").exists()
