"""Every command that a document shows is run here, on a tiny model and a few scenes in place of the real ones."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from laavit.microlab.dataset import DatasetSettings, write_dataset

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


def blocks(language: str, document: str = "README.md") -> list[str]:
    return [body for kind, body in BLOCK.findall((ROOT / document).read_text(encoding="utf-8")) if kind == language]


def documents() -> list[str]:
    listed = ["README.md", "CONTRIBUTING.md", "model_zoo/README.md", "model_zoo/microlab/README.md"]
    return listed + sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))


def shown_commands(document: str) -> list[str]:
    lines = [line.partition("  #")[0].strip() for body in blocks("bash", document) for line in body.splitlines()]
    return [line for line in lines if line]


@pytest.fixture
def workplace(tmp_path: Path, tiny_folder: Path) -> Path:
    """A folder like a checkout, with the real recipes and tools, a tiny model and a few scenes."""
    folder = tmp_path
    for name in ("tools", "model_zoo", "registry"):
        (folder / name).symlink_to(ROOT / name)
    write_dataset(folder / "data", DatasetSettings(train=3, val=1, test=2))
    (folder / "tiny").symlink_to(tiny_folder)
    return folder


SMALL = shlex.split(
    "--student hf --student.path tiny --teacher hf --teacher.path tiny --data.annotations data/train.json "
    "--data.root data/images --traces.path traces --traces.select [] --extract.batch_size 6 --extract.shard_size 6 "
    "--extract.max_new_tokens 2 --train.steps 2 --train.batch_size 2 --train.precision fp32 --filters null"
)


def stand_in(words: list[str]) -> list[str]:
    """The shown command with the tiny model and data; what it does is the same."""
    if words[:1] == ["lmms-eval"]:
        words = [
            sys.executable,
            "-m",
            "lmms_eval",
            *words[1:],
            "--include_path",
            str(ROOT / "eval/tasks"),
            "--limit",
            "2",
        ]
    elif words[:1] == ["laavit"]:
        words = [sys.executable, "-m", "laavit.cli", *words[1:]]
    elif words[:1] == ["python"]:
        words = [sys.executable, *words[1:]]
    line = " ".join(words)
    if "train.py" in line or "extract.py" in line or " plan " in line:
        words += SMALL
    if " microlab " in line:
        words += ["--train", "2", "--val", "1", "--test", "1"]
    if "tools/bench/" in line:
        words += BENCH[Path(words[1]).name].split()
    if "eval.py" in line:
        words += ["--data-root", "data/eval", "--limit", "2"]
    # the published benchmarks have their own tests (tests/evaluation); here the micro-lab's questions stand in for them
    tasks = [word for word in words if word.startswith(("blink_", "vstar_", "mmvp", "mmstar"))]
    for index, task in enumerate(tasks):
        words = [w for w in words if w != task] if index else ["microlab_test" if w == task else w for w in words]
    return words


BENCH = {"attention.py": "--tokens 64 --repeats 1"}


@pytest.mark.parametrize("document", documents())
def test_every_shown_command_runs(workplace: Path, document: str) -> None:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "LAAVIT_MICROLAB": str(workplace / "data/eval"),
        "OMP_NUM_THREADS": "1",
    }
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for command in shown_commands(document):
        words = shlex.split(command)
        if words[0] == "make":  # `make test` is what runs this; `make demo` has its own, slow, test
            assert words[1] in targets
            continue
        if command in ("bash .ci/run", ".venv/bin/pre-commit install"):  # both would set up or change the checkout
            assert (ROOT / ".ci/run").is_file() and (ROOT / ".pre-commit-config.yaml").is_file()
            continue
        ready = stand_in(words)
        done = subprocess.run(ready, cwd=workplace, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert document != "README.md" or (workplace / "runs/report.html").stat().st_size > 10_000


def test_the_gate_of_ten_lines_trains(workplace: Path) -> None:
    gate, recipe = blocks("python")
    (workplace / "my_gate.py").write_text(gate, encoding="utf-8")
    (workplace / "mine.py").write_text(recipe, encoding="utf-8")
    words = [sys.executable, "tools/extract.py", "mine.py", *SMALL]
    subprocess.run(words, cwd=workplace, check=True, capture_output=True)
    words = [sys.executable, "tools/train.py", "mine.py", "--gate.warmup", "7", "--work-dir", "runs/mine", *SMALL]
    done = subprocess.run(words, cwd=workplace, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"warmup": 7' in (workplace / "runs/mine/recipe.json").read_text(encoding="utf-8")
    assert "gamma" in (workplace / "runs/mine/log.jsonl").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    """The demo leaves its page, its table and an export, and LaViT beats Naive SFT by more than both intervals."""
    done = subprocess.run(
        [sys.executable, "tools/demo.py", "--root", str(tmp_path)], cwd=ROOT, timeout=1800, check=False
    )
    assert done.returncode == 0
    rows = {}
    for name in ("base", "naive_sft", "lavit"):
        summary = json.loads(
            (tmp_path / name / "eval/microlab_test-latents-on/summary.json").read_text(encoding="utf-8")
        )
        rows[name] = summary["tasks"]["microlab_test"]
    assert rows["lavit"]["low"] > rows["naive_sft"]["high"]
    assert (tmp_path / "report.html").is_file() and (tmp_path / "table.md").is_file()
    assert (tmp_path / "lavit/export/model.safetensors").is_file()
