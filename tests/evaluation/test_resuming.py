"""An evaluation that was stopped goes on: nothing is asked twice, nothing is taken over from another one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from laavit.evaluation import generation
from laavit.evaluation.bridge import Laavit
from laavit.evaluation.generation import Answerer
from laavit.evaluation.records import read_records
from laavit.evaluation.run import evaluate
from laavit.registry import UserError


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def whole(export: Path, microlab_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of an evaluation that nobody stopped."""
    return asked(export, microlab_data, tmp_path_factory.mktemp("whole"))


def asked(export: Path, data: Path, out: Path, **arguments: Any) -> list[dict[str, Any]]:
    given = {"batch_size": 5, "data_root": data} | arguments
    assert evaluate(export, ["microlab_test", "microlab_val"], out, **given) is not None
    return read_records(out / "records.jsonl")


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


class Counted:
    """Stands before the model: how large the batches are that it really answers; it can stop after so many."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.stop: int | None = None
        plain = Answerer.answer_and_count

        def answer_and_count(model: Answerer, chats: Any, *more: Any) -> Any:
            if len(self.sizes) == self.stop:
                raise KeyboardInterrupt
            self.sizes.append(len(chats))
            return plain(model, chats, *more)

        patch.setattr(Answerer, "answer_and_count", answer_and_count)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def stopped(counted: Counted, export: Path, data: Path, out: Path, after: int, **arguments: Any) -> None:
    """An evaluation that stops after so many batches."""
    counted.stop = after
    with pytest.raises(KeyboardInterrupt):
        asked(export, data, out, **arguments)
    counted.stop = None
    counted.sizes.clear()


def test_a_stopped_evaluation_asks_only_what_is_missing(
    export: Path, microlab_data: Path, tmp_path: Path, counted: Counted, whole: Any
) -> None:
    """24 and 6 questions in batches of 5; the same batches as without the stop, seconds of the first part included."""
    stopped(counted, export, microlab_data, tmp_path, after=3)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 15 and not (tmp_path / "records.jsonl").exists()
    records = asked(export, microlab_data, tmp_path)
    assert without_time(records) == without_time(whole) and sum(counted.sizes) == 15
    kept = {json.loads(line)["seconds"] for line in lines[1:]}
    assert {record["seconds"] for record in records} & {round(seconds, 6) for seconds in kept}
    assert json.loads((tmp_path / "summary.json").read_text())["resumed"] == 15
    assert sorted(file.name for file in tmp_path.iterdir()) == ["records.jsonl", "summary.json"]
    counted.sizes.clear()
    asked(export, microlab_data, tmp_path)  # a finished one is asked anew
    assert sum(counted.sizes) == 30


def test_answers_of_a_model_with_other_words_or_settings_are_not_gone_on_with(
    export: Path, microlab_data: Path, tmp_path: Path, counted: Counted
) -> None:
    """Weights alike, but how it decodes or splits words is another; a number of latents may be given as a word."""
    folder = shutil.copytree(export, tmp_path / "model")
    out = tmp_path / "out"
    stopped(counted, folder, microlab_data, out, after=2, latents=4)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 3.0}))
    with pytest.raises(UserError, match="processor"):
        asked(folder, microlab_data, out, latents=4)
    shutil.copy(export / "generation_config.json", folder)
    asked(folder, microlab_data, out, latents="4")
    assert sum(counted.sizes) == 20


def test_several_tasks_load_the_model_once(
    export: Path, microlab_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, plain = [], generation._load

    def load(*given: Any) -> Any:
        loads.append(given)
        return plain(*given)

    monkeypatch.setattr(generation, "_load", load)
    asked(export, microlab_data, tmp_path, limit=2)
    assert len(loads) == 1


def test_a_torn_line_is_asked_again(
    export: Path, microlab_data: Path, tmp_path: Path, counted: Counted, whole: Any
) -> None:
    stopped(counted, export, microlab_data, tmp_path, after=2)
    file = tmp_path / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    assert without_time(asked(export, microlab_data, tmp_path)) == without_time(whole)
    assert counted.sizes[0] == 1 and sum(counted.sizes) == 21


def test_other_weights_and_other_settings_are_refused(
    export: Path, microlab_data: Path, tmp_path: Path, counted: Counted
) -> None:
    stopped(counted, export, microlab_data, tmp_path, after=1)
    other = shutil.copytree(export, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"\(weights was .* and is .*\); --fresh drops them"):
        asked(other, microlab_data, tmp_path)
    with pytest.raises(UserError, match='latents was "on" and is "off"'):
        asked(export, microlab_data, tmp_path, latents="off")
    with pytest.raises(UserError, match=r"dtype was .*, system was"):
        asked(export, microlab_data, tmp_path, system="", dtype="bfloat16")
    with pytest.raises(UserError, match="max_pixels was null and is 1024"):
        asked(export, microlab_data, tmp_path, max_pixels=1024)
    assert counted.sizes == []
    asked(other, microlab_data, tmp_path, fresh=True)
    assert sum(counted.sizes) == 30


def test_another_question_under_the_same_number_is_asked(
    export: Path, microlab_data: Path, tmp_path: Path, counted: Counted, whole: Any
) -> None:
    """What was stored belongs to the prompt, the images and the settings, not to a place in a file."""
    stopped(counted, export, microlab_data, tmp_path / "out", after=3)
    turned = tmp_path / "data"
    turned.mkdir()
    import datasets

    for file in microlab_data.glob("*.parquet"):
        rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
        rows.select(range(len(rows) - 1, -1, -1)).to_parquet(turned / file.name)
    records = asked(export, turned, tmp_path / "out")
    assert sorted(r["id"] + r["prediction"] for r in records) == sorted(r["id"] + r["prediction"] for r in whole)
    assert sum(counted.sizes) > 15


def test_a_full_disk_stops_with_one_sentence(export: Path, microlab_data: Path, tmp_path: Path) -> None:
    """Where the records cannot be written, the answers are kept."""
    (tmp_path / "records.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot be written: .*; the answers are kept"):
        asked(export, microlab_data, tmp_path)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 31


def test_the_plain_model_keeps_a_journal_where_it_is_told(export: Path, tmp_path: Path) -> None:
    """lmms-eval's own command: journal=FOLDER among the model's arguments."""
    model = Laavit(str(export), journal=str(tmp_path))
    assert model.journal is not None and model.journal.about["versions"]["lmms_eval"]
    assert model.journal.about["latents"] == "on" and len(model.journal.about["weights"]) == 64
    assert Laavit(str(export)).journal is None


KILLED = """
import sys, time
from laavit.evaluation.generation import Answerer
plain = Answerer.answer_and_count
def slow(*given):
    found = plain(*given)
    time.sleep(0.2)
    return found
Answerer.answer_and_count = slow
from laavit.cli import run
sys.exit(run("eval", sys.argv[1:]))
"""


def test_a_killed_process_loses_nothing(
    export: Path, microlab_data: Path, tmp_path: Path, counted: Counted, whole: Any
) -> None:
    """SIGKILL while it answers: the same command goes on, and ends in the same records."""
    words = [str(export), "--tasks", "microlab_test", "microlab_val", "--data-root", str(microlab_data)]
    words += ["--batch-size", "5", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *words], stderr=subprocess.DEVNULL, env=os.environ)
    file = tmp_path / "answers.jsonl"
    while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") > 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = len(file.read_text().split("\n")) - 2
    assert 5 <= finished < 30
    assert without_time(asked(export, microlab_data, tmp_path)) == without_time(whole)
    assert sum(counted.sizes) == 30 - finished
