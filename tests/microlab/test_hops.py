"""Questions of one, two and three hops: right by a solver of its own, without a shortcut, read with their hops."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from laavit.cli import main as cli
from laavit.data.visual_cot import VisualCoT
from laavit.microlab.dataset import DatasetSettings, write_dataset
from laavit.microlab.packing import Packer
from laavit.microlab.questions import HOP_KINDS, QUESTION_KINDS, Question, ask, has_hops
from laavit.microlab.scenes import CELL, Scene, make_scene
from laavit.registry import UserError

SCENES = [make_scene(7, index, hops=True) for index in range(3000)]
ASKED: dict[str, list[tuple[Scene, Question]]] = {
    kind: [(scene, ask(scene, [kind])[0]) for scene in SCENES] for kind in HOP_KINDS
}
TEXT = re.compile(r"What (colour|shape) is the (.*)\?")


def solve(scene: Scene, text: str) -> tuple[str, list[tuple[int, int, int, int]]]:
    """The answer and the boxes on the way, from the words and a 3 x 3 table of what stands where."""
    table = [[next((s for s in scene.shapes if s.cell == 3 * y + x), None) for x in range(3)] for y in range(3)]
    found = TEXT.fullmatch(text)
    assert found
    *steps, name = found[2].split(" the ")
    word = name.removesuffix(" object")
    matches = [(x, y) for y in range(3) for x in range(3) if table[y][x] and word in vars(table[y][x]).values()]
    assert len(matches) == 1, "the words name one shape alone"
    way = matches
    for step in reversed(steps):
        x, y = way[-1]
        x += {"object left of": -1, "object right of": 1}.get(step, 0)
        y += {"object above": -1, "object below": 1}.get(step, 0)
        assert (x, y) not in way and 0 <= x <= 2 and 0 <= y <= 2 and table[y][x] is not None
        way.append((x, y))
    last = table[way[-1][1]][way[-1][0]]
    assert last is not None
    boxes = [(CELL * x, CELL * y, CELL * x + CELL, CELL * y + CELL) for x, y in way]
    return (last.colour if found[1] == "colour" else last.form), boxes


@pytest.mark.parametrize("kind", HOP_KINDS)
def test_answers_and_boxes_are_those_of_a_solver_of_its_own(kind: str) -> None:
    hops = ("one", "two", "three").index(kind.split("_")[0]) + 1
    for scene, question in ASKED[kind]:
        answer, boxes = solve(scene, question.text)
        assert (question.answer, question.hops) == (answer, tuple((box,) for box in boxes))
        assert len(question.hops) == hops and question.kind == kind.rsplit("_", 1)[0]


@pytest.mark.parametrize("kind", HOP_KINDS)
def test_the_words_say_nothing_of_the_answer(kind: str) -> None:
    """The commonest answer, over all, by text, and by each word, learned on one half, is at chance on the other."""
    chance = 1 / (6 if kind.endswith("colour") else 4)
    texts, answers = zip(*((q.text, q.answer) for _, q in ASKED[kind]), strict=True)
    half, overall = len(texts) // 2, Counter(answers)
    assert max(overall.values()) / len(answers) < chance + 0.03
    words = sorted({word for text in texts for word in text.split()})
    for seen in [lambda text: text, *(lambda text, word=word: word in text.split() for word in words)]:
        best: dict[Any, Counter[str]] = defaultdict(Counter)
        for text, answer in zip(texts[:half], answers[:half], strict=True):
            best[seen(text)][answer] += 1
        guesses = [best[seen(t)].most_common(1)[0][0] if seen(t) in best else "" for t in texts[half:]]
        hits = sum(guess == answer for guess, answer in zip(guesses, answers[half:], strict=True))
        assert hits / half < chance + 0.04  # 3.5 standard errors of 1500 guesses are 0.035 to 0.04


def test_the_first_shape_does_not_say_the_last_one_s_answer() -> None:
    """Who stops at the first hop, and answers with what stands there, is at chance."""
    for kind in list(HOP_KINDS)[2:]:
        attribute = "colour" if kind.endswith("colour") else "form"
        first = [next(s for s in scene.shapes if s.box == q.boxes[0]) for scene, q in ASKED[kind]]
        hits = sum(getattr(s, attribute) == q.answer for s, (_, q) in zip(first, ASKED[kind], strict=True))
        assert hits / len(SCENES) < 1 / (6 if attribute == "colour" else 4) + 0.05


def test_scenes_for_hops_can_be_asked_everything() -> None:
    assert {len(scene.shapes) for scene in SCENES} == {6, 7}
    assert len(ask(SCENES[0], [*QUESTION_KINDS, *HOP_KINDS])) == 12
    assert SCENES[0] != make_scene(7, 0) and SCENES[0] == make_scene(7, 0, hops=True)
    assert has_hops(["colour", "one_hop_shape"]) and not has_hops(list(QUESTION_KINDS))


def test_words_are_single_tokens_of_the_shipped_tokenizer(processor: Any) -> None:
    tokenizer = processor.tokenizer
    for kind in HOP_KINDS:
        for _, question in ASKED[kind][:200]:
            assert len(tokenizer.encode(question.text)) == len(question.text.split()) + 1
            assert len(tokenizer.encode(question.answer)) == 1
    Packer(processor, list(HOP_KINDS), width=24).pack(SCENES[:200])


def test_hops_survive_into_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        words = ["--train", "3", "--val", "1", "--test", "1"]
        assert cli(["microlab", str(tmp_path), "--kinds", "hops", *words]) == 0
    samples = VisualCoT(tmp_path / "train.json", tmp_path / "images")
    questions = [q for index in range(3) for q in ask(make_scene(101, index, hops=True), list(HOP_KINDS))]
    for sample, question in zip(samples, questions, strict=True):
        assert sample.meta["hops"] == [[place] for place in range(len(question.hops))]
        assert len(sample.boxes) == len(question.hops) and sample.source == f"microlab_{question.kind}"
        got = [(box.x1, box.y1, box.x2, box.y2) for box in sample.boxes]
        assert [pytest.approx([x / 96 for x in box], abs=1e-3) for box in question.boxes] == got


def test_a_plain_data_set_is_what_it_always_was(tmp_path: Path) -> None:
    write_dataset(tmp_path, DatasetSettings(train=4, val=2, test=3))
    content = (tmp_path / "train.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "6369dd068d4112314fe0811446182f58452b1b200f2f5bf95405af656c4ac93b"
    assert not any("hops" in record for record in json.loads(content))
    picture = (tmp_path / "images/train/000000.png").read_bytes()
    assert hashlib.sha256(picture).hexdigest() == "05691ec8a29c412e7d9fd401fbaa1ea593236274d2fd47b94e5011e8ec666dfd"


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UserError, match=r"kinds: no kind of question is called 'two_hops'; .*'two_hop_"):
        DatasetSettings(kinds=("two_hops",))
