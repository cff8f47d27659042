"""Every command that a document shows is run here, on a tiny model and a few scenes in place of the real ones."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from official import write_official
from PIL import Image
from torch.distributed.run import get_args_parser

from laavit.cli import main as cli
from laavit.microlab.dataset import DatasetSettings, write_dataset

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


def blocks(language: str, document: str = "README.md") -> list[str]:
    return [body for kind, body in BLOCK.findall((ROOT / document).read_text(encoding="utf-8")) if kind == language]


def documents() -> list[str]:
    listed = ["README.md", "CONTRIBUTING.md", "model_zoo/README.md", "model_zoo/microlab/README.md", "eval/README.md"]
    found = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
    return listed + [path for path in found if path != "docs/extending.md"]  # tests/test_extending.py runs that one


def shown_commands(document: str) -> list[str]:
    lines = [line.partition("  #")[0].strip() for body in blocks("bash", document) for line in body.splitlines()]
    return [line for line in lines if line]


@pytest.fixture
def workplace(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout, with the real recipes and tools, a tiny model and a few scenes; we are in it."""
    folder = tmp_path
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LAAVIT_MICROLAB", str(folder / "data/eval"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("tools", "model_zoo", "registry"):
        (folder / name).symlink_to(ROOT / name)
    write_dataset(folder / "data", DatasetSettings(train=3, val=1, test=2))
    (folder / "tiny").symlink_to(tiny_folder)
    write_features(folder / "LaViT-15k")
    write_official(tiny_folder, folder / "LaViT-3B")
    return folder


def write_features(root: Path) -> None:
    """One sample of LaViT-15k as its authors store it: 448 x 448 pixels, 16 x 16 tokens."""
    scores = (torch.arange(256) / 256 / 256).tolist()
    words = {"question_id": 1, "dataset": "gqa", "question": "What?", "ground_truth_enriched": "blue"}
    paths = {"image_relative_path": "a.png", "v_top_path_abs": "/there/data/v.pth", "attention_path_abs": "data/t.json"}
    (root / "data/images").mkdir(parents=True)
    Image.new("RGB", (448, 448), "red").save(root / "data/images/a.png")
    torch.save(torch.ones(256, 5120, dtype=torch.bfloat16), root / "data/v.pth")
    (root / "data/t.json").write_text(json.dumps({"steps": [{"p_t": scores, "raw_attention_scores": scores}]}))
    (root / "lavit_15k_for_training.json").write_text(json.dumps({"results": [words | paths]}))


SMALL = shlex.split(
    "--student hf --student.path tiny --teacher hf --teacher.path tiny --data.annotations data/train.json "
    "--data.root data/images --traces.path traces --traces.select [] --extract.batch_size 6 --extract.shard_size 6 "
    "--extract.max_new_tokens 2 --train.steps 2 --train.batch_size 2 --train.precision fp32 --filters null"
)


#: the same for docs/traces.md, whose recipe has filters and a store of its own
DATA = shlex.split("--data.annotations data/train.json --data.root data/images")
EXTRACTION = [
    *shlex.split("--teacher hf --teacher.path tiny --extract.batch_size 6 --extract.shard_size 6 --extract.workers 0"),
    *shlex.split("--extract.max_new_tokens 2 --filters.correctness.minimum 0 --filters.alignment.minimum 0"),
    *DATA,
]


def of_traces(words: list[str]) -> list[str]:
    """A command of docs/traces.md on the stand-ins; a cluster's launcher gives way to its one process."""
    if words[0] == "torchrun":  # its own parser takes the line; tests/teachers/test_engine.py runs two ranks
        given = get_args_parser().parse_args(words[1:])
        assert given.module and given.training_script == "laavit.cli"
        words = ["laavit", *given.training_script_args]
        if words[1] == "train":  # tests/engine runs several; here one holds all shares, and of several machines
            machines = given.nnodes not in ("1", "1:1")  # the options are read. In a process of its own: tests that
            words += ["--print-config"] if machines else []  # fork do not get on with one that has joined a group.
            return [sys.executable, "-m", "laavit.cli", *words[1:]]
    if "ray" in words:  # tests/teachers/test_engine.py runs a local Ray; here the options are read
        words = [*words, "--print-config"]
    if "--recipe" in words:
        return [*words, *DATA]
    return [*words, *EXTRACTION] if any(word.endswith(".py") for word in words) else words


def stand_in(words: list[str]) -> list[str]:
    """The shown command with the tiny model and data; what it does is the same."""
    # what a document measured on the demo's runs is done with its own run
    words = ["runs/pause" if re.fullmatch(r"runs/(demo|zoo)/[\w-]+/export", word) else word for word in words]
    if words[1:3] == ["data", "fetch"]:  # prints commands
        return words
    if "Qwen/Qwen2.5-VL-3B-Instruct" in words:  # the micro-lab's questions have no protocol of the paper's
        words = ["tiny" if "Qwen" in word else word for word in words if word not in ("--protocol", "paper")]
    if words[1] == "analyse":  # the demo's student and data; a few questions of two scenes in place of hundreds
        words = [re.sub(r"=runs/demo/\w+/export@[a-z+]+", "=zoo:microlab/student@answer", word) for word in words]
        words = [word.replace("runs/demo/data", "data") for word in words]
    if words[0] == "torchrun" or words[1] == "traces" or "viscot.py" in words:
        words = of_traces(words)
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
    elif words[:1] == ["python"]:
        words = [sys.executable, *words[1:]]
    line = " ".join(words)
    if words[1:2] == ["sweep"]:
        if "table_a2" in line:  # its grid sets the steps, and the micro-lab's seeds the student
            own = {"train.steps=1", *(["student.path=tiny"] if "microlab" in line else [])}
            return [*words, *(word for word in SWEEP if word not in own)]
        return [*words, *SWEEP, "--only", "naive_sft", *(["--dry-run"] if "torchrun" in words else [])]
    bench = "tools/bench/" in line
    if not bench and ("train.py" in line or "extract.py" in line or " plan " in line or " train " in line):
        words += SMALL
    if " microlab " in line:
        words += ["--train", "2", "--val", "1", "--test", "1"]
    if words[1:3] == ["data", "check"] and "--data" not in words:
        words += DATA
    if bench:
        words += BENCH[Path(words[1]).name].split()
    if "eval.py" in line or words[:2] == ["laavit", "eval"]:
        words += ["--data-root", "data/eval", "--limit", "2"]
    # the published benchmarks have their own tests (tests/evaluation); here the micro-lab's questions stand in for them
    tasks = [word for word in words if word.startswith(("blink_", "vstar_", "mmvp", "mmstar"))]
    for index, task in enumerate(tasks):
        words = [w for w in words if w != task] if index else ["microlab_test" if w == task else w for w in words]
    return words


#: one run without questions; tests/sweeps runs more of it
SWEEP = shlex.split(
    "--override student.path=tiny train.steps=1 train.batch_size=1 train.precision=fp32 data.root=data/images "
    "data.annotations=data/train.json --evaluate.tasks [] --before [] --seeds 0"
)

BENCH = {
    "attention.py": "--tokens 64 --repeats 1",
    "checkpoint.py": "--megabytes 4 --rows 4 --checkpoints 1 --repeats 1",
    "batches.py": "--steps 2 --images 200",
    "evaluation.py": "--quick",
    "train.py": "--tokens 16 36 --layers 1 --repeats 1 --ways best padded",
    "extract.py": "--quick",
    "loss.py": "--tokens 16 --vocabulary 512 --rows 4 --repeats 1",
    "reader.py": "--records 300",
    "training.py": "--tokens 64 --repeats 1 --families qwen2_5_vl --ways sft lavit",
}


@pytest.mark.parametrize("document", documents())
def test_every_shown_command_runs(workplace: Path, document: str, capsys: pytest.CaptureFixture[str]) -> None:
    for body in blocks("python", document):  # a recipe that names itself
        if named := re.match(r"# (\w+\.py)\n", body):
            (workplace / named[1]).write_text(body, encoding="utf-8")
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
        if ready[0] == "laavit":  # in this process: imports take most of a short command's time
            assert cli(ready[1:]) == 0, f"{command}\n{capsys.readouterr().err[-2000:]}"
            continue
        done = subprocess.run(ready, cwd=workplace, capture_output=True, text=True, timeout=300)
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
