"""Interventions by name: what is applied, where it comes from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laavit.cli import run
from laavit.evaluation.bridge import Laavit, Settings
from laavit.evaluation.interventions import MaskLatents
from laavit.registry import UserError

OWN = '''
from laavit.registry import INTERVENTIONS

@INTERVENTIONS.register_module()
class Paler:
    """Pixels, scaled."""

    def __init__(self, scale: float = 0.0) -> None:
        self.scale = scale

    def __call__(self, model, inputs, ids):
        assert [model.config.text_config.vocab_size > i for i in ids] == [True] * 4
        return {**inputs, "pixel_values": inputs["pixel_values"] * self.scale}
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("own") / "my.parts.py"  # a dot in the name is no package
    file.write_text(OWN)
    return file


def predictions(out: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in (out / "records.jsonl").read_text().splitlines()]


def test_an_intervention_of_ones_own(own: Path, export: Path, microlab_data: Path, tmp_path: Path) -> None:
    """Its argument arrives (a scale of 1 changes no answer, 0 does), and the summary says what was done."""
    words = [str(export), "--tasks", "microlab_test", "--data-root", str(microlab_data)]
    own_words = ["--import", str(own), "--intervention", "Paler", "--intervention.scale"]
    for name, more in {"plain": [], "same": [*own_words, "1.0"], "blank": [*own_words, "0.0"]}.items():
        assert run("eval", [*words, *more, "--out", str(tmp_path / name)]) == 0
    plain, same, blank = (predictions(tmp_path / name) for name in ("plain", "same", "blank"))
    assert plain == same and plain != blank
    told = json.loads((tmp_path / "blank/summary.json").read_text())["intervention"]
    assert told == {"name": "Paler", "scale": 0.0}
    assert json.loads((tmp_path / "plain/summary.json").read_text())["intervention"] is None


def test_latents_off_is_the_named_intervention(export: Path) -> None:
    chats = [[{"role": "user", "content": [{"type": "text", "text": question}]}] for question in ("how many ?", "yes")]
    off = Laavit(str(export), latents="off").answer(chats, Settings(6, ()))
    named = Laavit(str(export), intervention="latents_off")
    assert isinstance(named.intervention, MaskLatents)
    assert named.answer(chats, Settings(6, ())) == off


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"intervention": "latents_of"}, r"intervention: no intervention is called 'latents_of'.*'latents_off'"),
        ({"intervention": "Paler", "imports": "absent.py"}, r"imports: no file '.*absent\.py'"),
        ({"intervention": {"name": "Paler", "scal": 1}}, r"intervention\.scal: Paler takes no 'scal'.*'scale'"),
        ({"intervention": "Paler", "latents": "off"}, "another one was given"),
    ],
)
def test_what_is_refused(own: Path, export: Path, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Laavit(str(export), **{"imports": [str(own)], **arguments})


def test_a_flag_of_no_intervention_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval", ["x", "--tasks", "microlab_test", "--intervention.scale", "1"]) == 2
    assert run("eval", ["x", "--tasks", "microlab_test", "--batchsize", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "--intervention.scale" in lines[0] and "--batchsize" in lines[1]
