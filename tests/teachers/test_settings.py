"""What an extraction may be told, and what it is told where that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laavit.recipe import load_recipe
from laavit.registry import UserError
from laavit.teachers import ExtractSettings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ()}, r"extract\.rows: names no kind of row"),
        ({"rows": ("questions",)}, r"extract\.rows.*did you mean 'question'"),
        ({"layers": ()}, r"extract\.layers: names no layer"),
        ({"layers": "last two"}, r"extract\.layers: got 'last two'; allowed: a list of layers, 'last N'"),
        ({"layers": "last 0"}, r"extract\.layers: got 'last 0'"),
        ({"heads": ()}, r"extract\.heads: names no head"),
        ({"heads": ((1, 2, 3),)}, r"extract\.heads: got \(1, 2, 3\); allowed: a head, or a pair"),
        ({"heads": ((1, 2),), "layers": (1,)}, "leave extract.layers out beside pairs"),
        ({"normalisation": "min_max"}, r"extract\.normalisation.*did you mean 'minmax'"),
        ({"semantics": "gaze_topk"}, r"extract\.semantics.*did you mean 'gaze_top_k'"),
        ({"steps": "words"}, r"extract\.steps.*did you mean 'word'"),
        ({"steps": "group"}, r"extract\.steps: 'group' needs extract\.tagger"),
        ({"step_rows": "next"}, r"extract\.step_rows: got 'next'"),
        ({"blind": ""}, r"extract\.blind"),
        ({"answer": "golden"}, r"extract\.answer.*did you mean 'gold'"),
        ({"top_k": 0}, r"extract\.top_k: at least 1"),
        ({"gaze_top_k": 0}, r"extract\.gaze_top_k: at least 1"),
        ({"batch_size": 0}, r"extract\.batch_size: at least 1"),
        ({"workers": -1}, r"extract\.workers: at least 0"),
        ({"passes": 3}, r"extract\.passes: got 3; allowed: 1, 2"),
        ({"repetition_penalty": 0.0}, r"extract\.repetition_penalty: above 0"),
        ({"prompt_order": "question_first", "rows": ("question",)}, "a question before the image cannot look at it"),
        ({"prompt_order": "image_last"}, "allowed: image_first, question_first"),
    ],
)
def test_bad_settings_are_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExtractSettings(**changes)


def test_layers_and_heads_are_counted_in_the_teacher() -> None:
    assert ExtractSettings().pairs(3, 4) is None and ExtractSettings().depths(3) == (0, 1, 2)
    assert ExtractSettings(layers=(-1, 0, 2)).depths(3) == (0, 2)
    assert ExtractSettings(layers="last 2").depths(5) == (3, 4)
    assert ExtractSettings(heads=(-1, 0), layers=(1,)).pairs(3, 4) == {1: (0, 3)}
    assert ExtractSettings(heads=(1, (-1, 0))).pairs(2, 4) == {0: (1,), 1: (0, 1)}
    for changes in ({"layers": (3,)}, {"layers": "last 4"}, {"heads": ((3, 0),)}):
        with pytest.raises(UserError, match=r"the teacher has 3 decoder layers \(-3 to 2\)"):
            settings = ExtractSettings(**changes)
            settings.pairs(3, 4) or settings.depths(3)
    with pytest.raises(UserError, match=r"extract\.heads: got 4, and the teacher has 4 heads a layer"):
        ExtractSettings(heads=(4,)).pairs(3, 4)


def test_equal_settings_have_equal_headers() -> None:
    one, other = ExtractSettings(layers="last 2", workers=3), ExtractSettings(layers=(-2, -1))
    assert json.dumps(one.card()) == json.dumps(other.card())
    assert ExtractSettings(heads=((0, 1), 2)).card()["heads"] == [[0, 1], 2]
    assert ExtractSettings(heads=[[0, 1]]).card() == ExtractSettings(heads=((0, 1),)).card()  # type: ignore[list-item, arg-type]


@pytest.mark.parametrize(
    ("flags", "layers", "heads"),
    [
        (["--extract.layers", "last 2"], (-2, -1), None),
        (["--extract.layers", "[0,-1]", "--extract.heads", "[1,3]"], (0, -1), (1, 3)),
        (["--extract.heads", "[[2,0],1]"], None, ((2, 0), 1)),
    ],
)
def test_a_recipe_and_its_flags_say_the_same(tmp_path: Path, flags: list[str], layers: tuple, heads: tuple) -> None:
    file = tmp_path / "cfg.py"
    file.write_text("student = 'qwen2_5_vl_3b'\n")
    settings = load_recipe(file, flags).build("extract")
    assert settings.layers == layers and settings.heads == heads
