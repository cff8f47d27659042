"""The micro-lab's shipped teacher over scenes: one process, torchrun, array jobs and Ray leave the same bytes."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from laavit.cli import run
from laavit.microlab.dataset import DatasetSettings, write_dataset
from laavit.teachers import ray_engine
from laavit.traces.store import TraceStore, verify

RECIPE = "zoo:microlab/lavit.py"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes with 72 questions."""
    folder = tmp_path_factory.mktemp("split") / "data"
    write_dataset(folder, DatasetSettings(train=12, val=1, test=1))
    return folder


def words(scenes: Path, out: Path, *more: str) -> list[str]:
    data = ("--data.annotations", str(scenes / "train.json"), "--data.root", str(scenes / "images"))
    sizes = ("--extract.batch_size", "6", "--extract.shard_size", "12")
    # the recipe reads every prompt twice; what a user gets by default is one reading, and has to hold here, too
    return [RECIPE, *data, *sizes, "--extract.passes", "1", "--traces.path", str(out), *more]


@pytest.fixture(scope="module")
def whole(scenes: Path) -> Path:
    """The store of one process."""
    out = scenes.parent / "whole"
    assert run("extract", words(scenes, out)) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store, verdicts and header too; locks and other hidden files do not count."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    named = {str(path.relative_to(folder)): path for path in files}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith(".")}


def check(out: Path, whole: Path) -> None:
    assert verify(out) == {} and TraceStore(out).ids == TraceStore(whole).ids and len(TraceStore(out)) == 72
    found, expected = contents(out), contents(whole)
    assert found.keys() == expected.keys() and len([name for name in found if name.endswith(".json")]) > 6
    assert [name for name in expected if found[name] != expected[name]] == []


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LAAVIT_LOG": "ERROR"}


def torchrun(arguments: list[str]) -> subprocess.Popen[str]:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    command = [*launcher, "-m", "laavit.cli", "extract", *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, start_new_session=True)


def test_two_processes_of_torchrun(scenes: Path, whole: Path, tmp_path: Path) -> None:
    process = torchrun(words(scenes, tmp_path / "store"))
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    check(tmp_path / "store", whole)


@pytest.mark.parametrize("order", ["123", "312", "231"])
def test_three_array_jobs_in_any_order(scenes: Path, whole: Path, tmp_path: Path, order: str) -> None:
    for part in order:
        assert not (tmp_path / "store" / "verdicts").exists()  # the last one judges
        assert run("extract", words(scenes, tmp_path / "store", "--part", f"{part}/3")) == 0
    check(tmp_path / "store", whole)


def actors(process: int) -> list[int]:
    """The Ray actors that a process has started."""
    every = psutil.process_iter(["pid", "cmdline"])
    named = {each.pid for each in every if "ShardActor" in " ".join(each.info["cmdline"] or [])}
    return [child.pid for child in psutil.Process(process).children(recursive=True) if child.pid in named]


def progress(out: Path) -> int:
    """How much there is of a store, 36 when it is complete: 6 a shard, 2 a batch of one that is not."""
    return 6 * len(list(out.glob("shard-*.json"))) + len(list(out.glob(".spool-*/*")))


def test_ray_on_this_machine_and_an_actor_killed(scenes: Path, whole: Path, tmp_path: Path) -> None:
    out, kills = tmp_path / "store", []

    def kill() -> None:
        while not progress(out):
            time.sleep(0.002)
        os.kill(actors(os.getpid())[0], signal.SIGKILL)
        kills.append(progress(out))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert run("extract", words(scenes, out, "--engine", "ray", "--actors", "1")) == 0
    assert kills and kills[0] < 30, "the kill came too late to mean anything"
    check(out, whole)


def test_without_ray_the_command_to_install_it_is_said(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run("extract", words(scenes, tmp_path / "store", "--engine", "ray")) == 2
    assert "pip install 'laavit[ray]'" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("extract", words(scenes, tmp_path / "store", "--engine", "ray")) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_an_actors_error_is_one_sentence(scenes: Path, whole: Path, tmp_path: Path) -> None:
    """What an actor refuses is told with its first shard, without Ray around it."""

    def build() -> Any:
        from laavit.registry import UserError

        raise UserError("no such teacher")

    work = ray_engine.Work(build, None, tmp_path / "store", {}, Path.cwd())  # type: ignore[arg-type]
    found = ray_engine.ShardActor(work)({"id": [3], "again": [False]})  # type: ignore[dict-item]
    assert found["error"].tolist() == ["no such teacher"] and not found["done"][0] and found["id"].tolist() == [3]


def test_bad_flags_are_one_sentence(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for more, said in ((("--part", "4/3"), "--part is i/n"), (("--engine", "spark"), "invalid choice: 'spark'")):
        assert run("extract", words(scenes, tmp_path / "store", *more)) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


_spec = importlib.util.spec_from_file_location("corpus", Path(__file__).parents[1] / "data" / "corpus.py")
assert _spec is not None and _spec.loader is not None
corpus = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(corpus)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_corpus_of_bad_inputs(tmp_path: Path, workers: str) -> None:
    """Every bad input is in quarantine, at reading or at extraction, and the good ones are all there."""
    from laavit.data.visual_cot import VisualCoT

    written = corpus.write(tmp_path)
    data = ("--data.annotations", str(written.annotations), "--data.root", str(written.root))
    sizes = ("--extract.batch_size", "8", "--extract.shard_size", "16", "--extract.workers", workers)
    assert run("extract", [RECIPE, *data, *sizes, "--traces.path", str(tmp_path / "store")]) == 0
    store = TraceStore(tmp_path / "store")
    assert store.ids == written.good_ids and len(store.quarantined) > 12 and verify(tmp_path / "store") == {}
    unread = {entry.id for entry in VisualCoT(written.annotations, written.root).quarantined}
    assert written.bad_ids.keys() <= {*unread, *store.quarantined}
    assert all(reason and "\n" not in reason for reason in store.quarantined.values())


def ended(process: subprocess.Popen[str], out: Path, dice: random.Random, victims: Any) -> bool:
    """Let a command make some progress, then kill; True where it ended by itself before."""
    before, limit = progress(out), dice.randint(1, 5)
    while process.poll() is None and progress(out) < before + limit:
        time.sleep(0.002)
    if process.poll() is not None:
        return True
    for victim in victims(process):
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended in the meantime
    return False


def family(process: subprocess.Popen[str]) -> list[int]:
    """A command's processes, its own last."""
    return [child.pid for child in psutil.Process(process.pid).children(recursive=True)] + [process.pid]


def one_rank(process: subprocess.Popen[str]) -> list[int]:
    return family(process)[:1]


def until_done(start: Any, out: Path, dice: random.Random, victims: Any, rounds: int = 6) -> int:
    """Start a command and kill at a random moment, ``rounds`` times, then let it finish; the number of kills."""
    kills = 0
    for _ in range(rounds):
        process = start()
        kills += not ended(process, out, dice, victims)
        process.wait(timeout=200)
    process = start()
    assert process.wait(timeout=200) == 0
    return kills


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_kills_under_torchrun(scenes: Path, whole: Path, tmp_path: Path, seed: int) -> None:
    """The whole machine in one half of the runs, one rank in the other; 20 kills in all."""
    out, victims = tmp_path / "store", (one_rank, family)[seed % 2]
    assert until_done(lambda: torchrun(words(scenes, out)), out, random.Random(seed), victims) >= 5
    check(out, whole)


def on_ray(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "laavit.cli", "extract", *arguments, "--engine", "ray", "--actors", "2"]
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, stderr=subprocess.DEVNULL, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_kills_on_ray(scenes: Path, whole: Path, tmp_path: Path, seed: int) -> None:
    """The whole machine, or the command alone, which Ray's other processes notice and go; 20 kills in all."""
    out, known = tmp_path / "store", list[psutil.Process]()

    def start() -> subprocess.Popen[str]:
        psutil.wait_procs(known, timeout=100)  # those of the killed run, on their way out
        return on_ray(words(scenes, out))

    def victims(process: subprocess.Popen[str]) -> list[int]:
        known[:] = psutil.Process(process.pid).children(recursive=True)
        return family(process) if seed % 2 else [process.pid]

    assert until_done(start, out, random.Random(seed), victims) >= 5
    check(out, whole)
