"""What a training command does with a scheduler's signal, and what its other processes say."""

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

from laavit.cli import run
from laavit.commands import train
from laavit.engine import TrainSettings
from laavit.registry import UserError


def test_sigterm_ends_a_run_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def parse(parser: object, argv: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal comes first")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train, "parse_recipe", parse)
    assert run("train", []) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_with_several_processes_sigterm_is_left_to_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    with train.stopped_by_sigterm():
        assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("rank", "asked"), [(0, None), (1, None), (1, "INFO")])
def test_what_all_processes_know_is_told_by_the_first(
    monkeypatch: pytest.MonkeyPatch, rank: int, asked: str | None
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.delenv("LAAVIT_LOG", raising=False)
    if asked:
        monkeypatch.setenv("LAAVIT_LOG", asked)
    engine, own = logging.getLogger("laavit.engine"), logging.getLogger("laavit.engine.own")
    monkeypatch.setattr(logging.getLogger("laavit"), "level", logging.INFO)
    for name in ("laavit", "laavit.engine", "laavit.engine.own"):
        logging.getLogger(name).manager._clear_cache()
    with train.told_once():
        silent = rank > 0 and asked is None
        assert engine.isEnabledFor(logging.WARNING) is not silent
        assert own.isEnabledFor(logging.WARNING) and engine.isEnabledFor(logging.ERROR)
        assert own.isEnabledFor(logging.INFO) is not silent
    assert engine.isEnabledFor(logging.INFO) and own.level == logging.NOTSET


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    class OnlySettings:
        config: ClassVar = {"seed": 0}

        def build(self, name: str) -> TrainSettings:
            assert name == "train", "data and weights come later"
            return TrainSettings(device="cpu")

    there = tmp_path / "checkpoints" / "iter_000004"
    there.mkdir(parents=True)
    (there / "state.json").write_text(json.dumps({"files": {}}))
    with pytest.raises(UserError, match="already holds a run up to 'iter_000004'"):
        train.train_recipe(cast("Any", OnlySettings()), tmp_path)
