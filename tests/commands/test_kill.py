"""SIGKILL during extraction and training on micro-lab data: resumed, the files end with the same bits."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from laavit.microlab.dataset import DatasetSettings, write_dataset
from laavit.microlab.tiny import Sizes, build_model, build_processor, build_tokenizer
from laavit.traces.store import TraceStore

RECIPE = """
student = dict(name="hf", path={student!r})
teacher = dict(name="hf", path={teacher!r})
latents = dict(name="learned", count=4)
gate = dict(name="cosine", warmup=6)
targets = dict(concept="concept", trajectory="trajectory")
filters = dict(correctness="correctness", alignment="alignment")
data = dict(name="visual_cot", annotations={data!r} + "/train.json", root={data!r} + "/images")
prompt = dict(system="")
extract = dict(rows=("header", "answer"), layers=(-2, -1), max_new_tokens=3, batch_size=4, shard_size=8)
train = dict(
    steps=12, batch_size=2, grouped=True, lr=2e-3, checkpoint_every=2, log_every=1, threads=1, tensorboard=False,
    device="cpu",
)
"""


Job = tuple[str, tuple[object, ...], dict[str, str]]


class Runner:
    """A process that forks killable commands; see running.py."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LAAVIT_LOG": "ERROR"}
        script = Path(__file__).with_name("running.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, text=True,
        )  # fmt: skip

    def __call__(self, command: str, *words: object, kill_after: float | None = None) -> dict[str, Any]:
        found = self.together([(command, words, {})], kill_after)
        return {"code": found["codes"][0], "seconds": found["seconds"]}

    def together(self, jobs: list[Job], kill_after: float | None = None, kill: list[int] | None = None) -> Any:
        """Run jobs side by side, killing all of them, or those in ``kill``, after so many seconds."""
        assert self.process.stdin is not None and self.process.stdout is not None
        plain = [(command, [str(word) for word in words], more) for command, words, more in jobs]
        request = {"jobs": plain, "kill_after": kill_after, "kill": list(range(len(jobs))) if kill is None else kill}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight micro-lab scenes with all their questions, a tiny teacher and a tinier student."""
    folder = tmp_path_factory.mktemp("kill")
    write_dataset(folder / "data", DatasetSettings(train=8, val=1, test=1))
    tokenizer = build_tokenizer(scenes=40)
    places = {}
    for seed, (name, width) in enumerate((("teacher", 48), ("student", 24))):
        sizes = Sizes(width, 2, 2, 24, 1, 2, 2)
        build_model(sizes, tokenizer, seed).save_pretrained(folder / name)
        build_processor(tokenizer).save_pretrained(folder / name)
        places[name] = str(folder / name)
    (folder / "cfg.py").write_text(RECIPE.format(data=str(folder / "data"), **places))
    return folder / "cfg.py"


def content(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Files by name; locks and other hidden files do not count."""
    found = [path for pattern in patterns for path in folder.rglob(pattern) if path.is_file() and path.name[0] != "."]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(found)}


def killed(runner: Runner, kills: int, seed: int, whole: float, *words: object) -> list[int]:
    """Run a command, kill it at random moments of its working time, then let it finish; the exit codes."""
    moments, codes = random.Random(seed), []
    for number in range(kills):
        # what an earlier attempt finished is not done again, so the later ones have to be killed sooner
        latest = 0.85 / (1 + number)
        codes.append(runner(*words, kill_after=whole * moments.uniform(0.15, max(latest, 0.25)))["code"])
    codes.append(runner(*words)["code"])
    return codes


@pytest.fixture(scope="module")
def reference(runner: Runner, recipe: Path) -> dict[str, float]:
    """Uninterrupted: the store in WHOLE/traces, the run in WHOLE/run; the seconds each took."""
    whole = recipe.parent / "whole"
    found = runner("extract", recipe, "--traces.path", whole / "traces")
    assert found["code"] == 0
    done = runner("train", recipe, "--traces.path", whole / "traces", "--work-dir", whole / "run")
    assert done["code"] == 0
    return {"extract": found["seconds"], "train": done["seconds"]}


def check_extract(runner: Runner, recipe: Path, reference: dict[str, float], place: Path, kills: int, seed: int) -> int:
    words = ("extract", recipe, "--traces.path", place / "traces")
    codes = killed(runner, kills, seed, reference["extract"], *words)
    expected = content(recipe.parent / "whole" / "traces", "*")
    assert codes[-1] == 0 and len([name for name in expected if name.endswith(".arrow")]) > 6
    assert content(place / "traces", "*") == expected
    return codes.count(-9)


def check_train(runner: Runner, recipe: Path, reference: dict[str, float], place: Path, kills: int, seed: int) -> int:
    whole = recipe.parent / "whole"
    words = ("train", recipe, "--traces.path", whole / "traces", "--work-dir", place / "run", "--resume")
    codes = killed(runner, kills, seed, reference["train"], *words)
    final = "checkpoints/iter_000012/*.safetensors"
    expected = content(whole / "run", final)
    assert codes[-1] == 0 and len(expected) == 4  # weights, heads, optimizer, random generators
    found = content(place / "run", final)
    assert [name for name in expected if found.get(name) != expected[name]] == []
    lines = [
        (place / "run" / "log.jsonl").read_text().splitlines(),
        (whole / "run" / "log.jsonl").read_text().splitlines(),
    ]
    figures = [
        [{k: json.loads(line)[k] for k in ("loss", "ntp", "concept", "trajectory", "gamma")} for line in text]
        for text in lines
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 12
    return codes.count(-9)


def test_a_killed_extraction_ends_with_the_same_bits(
    runner: Runner, recipe: Path, reference: dict[str, float], tmp_path: Path
) -> None:
    assert check_extract(runner, recipe, reference, tmp_path, kills=2, seed=1) >= 1


def test_a_killed_training_ends_with_the_same_bits(
    runner: Runner, recipe: Path, reference: dict[str, float], tmp_path: Path
) -> None:
    assert check_train(runner, recipe, reference, tmp_path, kills=2, seed=1) >= 1


MODES: dict[str, list[tuple[tuple[str, ...], dict[str, str]]]] = {
    "one process": [((), {})],
    "two ranks": [((), {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}) for rank in range(2)],
    "three array jobs": [(("--part", f"{part}/3"), {}) for part in (1, 2, 3)],
}


def split_and_killed(runner: Runner, words: tuple[object, ...], mode: str, whole: float, kills: int, seed: int) -> int:
    """Kill a mode's processes, or one of them, until there were so many kills; then let all finish."""
    dice, count = random.Random(seed), 0
    jobs = [("extract", (*words, *more), environment) for more, environment in MODES[mode]]
    for _ in range(3 * kills):
        if count >= kills:
            break
        chosen = jobs if mode == "two ranks" else dice.sample(jobs, dice.randint(1, len(jobs)))
        victims = list(range(len(chosen))) if dice.random() < 0.6 else [dice.randrange(len(chosen))]
        moment = dice.uniform(0.1, 0.25 + 0.5 / (1 + count)) * whole
        count += runner.together(chosen, moment, victims)["codes"].count(-9)
    assert set(runner.together(jobs)["codes"]) == {0}
    return count


@pytest.fixture(scope="module")
def shipped(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Twelve scenes through the micro-lab's shipped teacher, uninterrupted: the folder, and the seconds it took."""
    folder = tmp_path_factory.mktemp("shipped")
    write_dataset(folder / "data", DatasetSettings(train=12, val=1, test=1))
    return folder, runner("extract", *of_shipped(folder, folder / "whole"))["seconds"]


def of_shipped(folder: Path, out: Path) -> tuple[object, ...]:
    data = ("--data.annotations", folder / "data" / "train.json", "--data.root", folder / "data" / "images")
    sizes = ("--extract.batch_size", 4, "--extract.shard_size", 8)
    return ("zoo:microlab/lavit.py", *data, *sizes, "--traces.path", out)


def check_split(runner: Runner, shipped: tuple[Path, float], out: Path, mode: str, kills: int, seed: int) -> int:
    folder, seconds = shipped
    found = split_and_killed(runner, of_shipped(folder, out), mode, seconds, kills, seed)
    assert content(out, "*") == content(folder / "whole", "*") and len(TraceStore(out)) == 72
    return found


@pytest.mark.parametrize("mode", MODES)
def test_the_shipped_teachers_traces_survive_kills_in_every_split(
    runner: Runner, shipped: tuple[Path, float], tmp_path: Path, mode: str
) -> None:
    assert check_split(runner, shipped, tmp_path / "store", mode, kills=2, seed=3) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_shipped_teachers_traces_survive_many_kills(
    runner: Runner, shipped: tuple[Path, float], tmp_path: Path, mode: str
) -> None:
    assert sum(check_split(runner, shipped, tmp_path / str(n), mode, kills=8, seed=n) for n in range(4)) >= 24


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 16))
def test_many_kills(runner: Runner, recipe: Path, reference: dict[str, float], tmp_path: Path, seed: int) -> None:
    kills = check_extract(runner, recipe, reference, tmp_path, kills=5, seed=seed)
    kills += check_train(runner, recipe, reference, tmp_path, kills=5, seed=seed)
    assert kills >= 4
