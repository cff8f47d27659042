"""docs/extending.md, executed: every file it shows is written, every command it shows is run."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import families.vipllava
import pytest
import torch
from PIL import Image

from laavit.backbones import Backbone, PromptSettings
from laavit.cli import run
from laavit.custom import FILE, import_custom
from laavit.microlab.dataset import DatasetSettings, write_dataset
from laavit.recipe import build_part
from laavit.registry import FAMILIES, KINDS
from laavit.structures import Sample
from laavit.traces.store import TraceStore

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.M | re.S)
FILES = {body.split("\n")[0].removeprefix("# "): body for kind, body in BLOCKS if kind != "bash"}
COMMANDS = [line for kind, body in BLOCKS if kind == "bash" for line in body.splitlines()]
#: kind -> the file that shows it, and the registry it names
SHOWN = {
    "gates": ("my_gate.py", "GATES"),
    "targets": ("my_target.py", "TARGETS"),
    "latents": ("my_latents.py", "LATENTS"),
    "data": ("my_data.py", "DATASETS"),
    "filters": ("my_filters.py", "FILTERS"),
    "judges": ("my_filters.py", "JUDGES"),
    "teachers": ("my_teacher.py", "TEACHERS"),
    "interventions": ("my_intervention.py", "INTERVENTIONS"),
    "strategies": ("my_strategy.py", "STRATEGIES"),
    "families": ("my_family.py", "FAMILIES"),  # of a student
}
#: the tiny model and data in place of the shown ones
SMALL = shlex.split(
    "--teacher.path tiny --traces.path traces --traces.select [] --train.steps 2 --train.batch_size 2 "
    "--train.precision fp32 --train.tensorboard false --train.log_every 1 --train.device cpu "
    "--extract.batch_size 3 --extract.shard_size 3 --extract.max_new_tokens 2 --extract.workers 0 --train.workers 0"
)


@pytest.fixture
def registries() -> Iterator[None]:
    """What is registered meanwhile is forgotten afterwards: other tests execute the same files."""
    every = [*KINDS.values(), FAMILIES]
    for registry in every:
        registry.import_from_location()
    kept = [dict(registry.module_dict) for registry in every]
    yield
    for registry, known in zip(every, kept, strict=True):
        registry.module_dict.clear()
        registry.module_dict.update(known)
    for name in [name for name in sys.modules if name.startswith(FILE)]:
        del sys.modules[name]


@pytest.fixture
def workplace(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything the document shows, a tiny model and six samples; we are in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "model_zoo").symlink_to(ROOT / "model_zoo")
    (tmp_path / "tiny").symlink_to(tiny_folder)
    write_dataset(tmp_path / "lab", DatasetSettings(train=1, val=1, test=1))
    for name, body in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(body, encoding="utf-8")
    (tmp_path / "images").mkdir()
    lines = []
    for index, size in enumerate([(48, 32), (32, 80), (64, 64)]):
        Image.new("RGB", size, ("red", "green", "blue")[index]).save(tmp_path / f"images/{index}.png")
        item = {"file": f"{index}.png", "ask": "What colour is the shape?", "say": "blue", "box": [0.1, 0.2, 0.6, 0.9]}
        lines += [item, item | {"ask": "yes or no?", "say": "no"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, [1]]))
    return tmp_path


def log(folder: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def test_every_kind_has_a_file_of_at_most_thirty_lines() -> None:
    assert set(SHOWN) == {*KINDS, "families"} - {"students"}
    for name, registry in SHOWN.values():
        assert f"@{registry}.register_module" in FILES[name]
    for name, body in FILES.items():
        assert len(body.splitlines()) <= 30, name
        assert all(len(line) <= 120 for line in body.splitlines()), name


def test_the_recipe_of_the_document(workplace: Path, registries: None) -> None:
    """Extracts, trains, evaluates and trains another family, with parts of one's own alone."""
    model, processor = families.vipllava.build()
    model.save_pretrained(workplace / "vipllava")
    processor.save_pretrained(workplace / "vipllava")
    extract, train, evaluate, family = (shlex.split(line)[1:] for line in COMMANDS[:4])
    assert run(extract[0], [*extract[1:], *SMALL]) == 0
    store = TraceStore(Path("traces"))
    assert store.header["gaze"] == "squared" and len(store) == 6  # the seventh line is no object
    trace = store.get("pair-0")
    assert {"brief", "correctness", "correctness.judge"} <= trace.verdicts.keys() and trace.scores["brief"] <= 2
    student = ["--student", "hf", "--student.path", "tiny"]
    assert run(train[0], [*train[1:], *student, *SMALL]) == 0
    lines = log("runs/mine")
    assert lines[-1]["gamma"] == pytest.approx((1 / 200) ** 0.7) and 0 < lines[-1]["entropy"] < math.log(16)
    assert {"concept", "trajectory"} <= lines[-1].keys()
    for word, stand_in in (("blink_relative_depth", "microlab_test"), ("0.5", "1.0")):
        evaluate = [stand_in if given == word else given for given in evaluate]
    assert run(evaluate[0], [*evaluate[1:], "--data-root", "lab/eval", "--limit", "2"]) == 0
    summary = json.loads(Path("runs/mine/eval/microlab_test-latents-on-NoisyImage-share=1.0/summary.json").read_text())
    assert summary["intervention"] == {"name": "NoisyImage", "share": 1.0}
    family = ["vipllava" if "llava-hf" in word else word for word in family]
    assert run(family[0], [*family[1:], *SMALL]) == 0
    assert log("runs/vip")[-1]["loss"] > 0


def test_the_latents_of_the_document_start_at_words(workplace: Path, registries: None) -> None:
    import_custom("my_latents.py", workplace)
    backbone = Backbone.load("tiny")
    latents = build_part("latents", "latents", {"type": "WordLatents", "words": ["red", "blue circle"]})
    latents.add_to(backbone.model, backbone.tokenizer, torch.Generator())
    rows, tokenizer = backbone.model.get_input_embeddings().weight, backbone.tokenizer
    for token, word in (("<|latent_1|>", "red"), ("<|latent_2|>", "blue circle")):
        wanted = rows[tokenizer.encode(word)].mean(0)
        assert torch.equal(rows[tokenizer.convert_tokens_to_ids(token)], wanted)


def test_the_family_of_the_document_knows_what_it_sees(workplace: Path, registries: None) -> None:
    """Its tiles are where the crop is: pixels outside change nothing, pixels inside do; a span has its tokens."""
    import_custom("my_family.py", workplace)
    backbone = Backbone(*families.vipllava.build())
    builder = backbone.builder(PromptSettings(system=""))
    for size, region in (((64, 32), (0.25, 0, 0.75, 1)), ((32, 96), (0, 1 / 3, 1, 2 / 3)), ((40, 40), (0, 0, 1, 1))):
        plain = Image.new("RGB", size, "red")
        found = builder.prompt_of(Sample("x", (Path("a"), Path("b")), "What?", "blue"), [plain, plain])
        assert [span.tile.region for span in found.spans] == [pytest.approx(region)] * 2
        image = (found.input_ids == backbone.family.image_token_id).nonzero().flatten()
        assert torch.equal(torch.cat([span.positions() for span in found.spans]), image) and len(image) == 32
        left, top, right, bottom = (round(share * side) for share, side in zip(region, size * 2))
        for box, same in (
            ((left, top, right, bottom), False),
            ((0, 0, left, size[1]), True),
            ((0, 0, size[0], top), True),
        ):
            painted = plain.copy()
            painted.paste("blue", box)
            seen = builder.prompt_of(Sample("x", (Path("a"), Path("b")), "What?", "blue"), [painted, plain])
            assert torch.equal(seen.vision["pixel_values"], found.vision["pixel_values"]) == same


def test_the_plug_in_of_the_document(workplace: Path) -> None:
    """Built and installed as the document says, then used by a process that knows nothing of its files."""
    install, *commands = COMMANDS[4:]
    assert shlex.split(install)[:2] == ["pip", "install"] and len(commands) == 2
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "install", "-q"]
    flags = ["--no-deps", "--no-index", "--no-build-isolation", "--target", "site"]
    subprocess.run([*pip, *flags, *shlex.split(install)[2:]], check=True, capture_output=True)
    shutil.rmtree("my_plugin")
    environment = {**os.environ, "PYTHONPATH": "site", "HF_HUB_OFFLINE": "1"}
    small = [*SMALL, "--teacher", "hf", "--student", "hf", "--student.path", "tiny", "--targets", "null"]
    small += ["--data", "llava", "--data.annotations", "chats.json", "--data.root", "images", "--filters", "null"]
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "blue"}]
    chats = [{"id": index, "image": f"{index}.png", "conversations": turns} for index in (0, 1)]
    Path("chats.json").write_text(json.dumps(chats))
    words = [shlex.split(command)[1:] + (small if " train " in command else []) for command in commands]
    script = "import json, sys; from laavit.cli import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))"
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(words)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "my_plugin.StairsGate" in done.stdout
    recipe = json.loads(Path("runs/stairs/recipe.json").read_text())
    assert recipe["gate"] == {"type": "StairsGate", "count": 4, "every": 50} and log("runs/stairs")[0]["gamma"] == 0.0
