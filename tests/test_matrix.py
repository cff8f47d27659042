"""Every part with every other: each combination trains, saves, resumes to the same bits, generates and is exported."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from combining import (
    EXTRAS,
    GATES,
    MODES,
    STUDENTS,
    Cell,
    World,
    every,
    pairwise,
    target_of,
)
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from laavit.commands.export import export_run
from laavit.commands.train import train_recipe
from laavit.compatibility import check
from laavit.data.aligned import AlignedDataset, Collate
from laavit.evaluation.bridge import Laavit, Settings
from laavit.latents import LatentLayout, latent_tokens
from laavit.model import LaViT, build_gate, build_model, build_targets
from laavit.recipe import Recipe, apply_overrides, cards
from laavit.registry import UserError
from laavit.structures import Encoded, Sample
from laavit.traces.store import TraceStore

STEPS = 5


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("matrix") / "world")


def check_log(run: Path, recipe: Recipe) -> None:
    """Three steps; every figure is finite, every target and gate has its own."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines] == [1, 2, 3]
    gates = recipe.build("gate").parts() if recipe.has("gate") else {}
    for line in lines:
        assert {"loss", "ntp", *recipe.config["targets"], *gates} <= set(line)
        assert all(torch.isfinite(torch.tensor(value)) for value in line.values() if isinstance(value, float))


def check_resumed(recipe: Recipe, run: Path, last: Path, again: Path) -> None:
    """From the checkpoint of the second step on, in a new model: every file of the third has the same bytes."""
    shutil.copytree(run / "checkpoints" / "iter_000002", again / "checkpoints" / "iter_000002")
    resumed = train_recipe(recipe, again, resume=True)
    assert resumed.name == last.name == "iter_000003"
    wanted, found = ({path.name: path.read_bytes() for path in place.iterdir()} for place in (last, resumed))
    assert {name for name in wanted | found if wanted.get(name) != found.get(name)} == set()


def loaded(recipe: Recipe, checkpoint: Path) -> LaViT:
    model = build_model(recipe, TraceStore(recipe.config["traces"]["path"]).header)
    model.load_checkpoint(checkpoint)
    return model.eval()


def prompts_of(model: LaViT, recipe: Recipe, samples: list[Sample]) -> list[Encoded]:
    """As an export asks: the most latents, where their number varies."""
    layout = model.student.layout
    builder = model.student.backbone.builder(recipe.build("prompt"), layout if layout.emitted else layout.most)
    return [builder.prompt_of(sample) for sample in samples]


def chat_of(sample: Sample, recipe: Recipe) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": Image.open(path).convert("RGB")} for path in sample.images]
    text = [{"type": "text", "text": sample.question + recipe.config["prompt"]["suffix"]}]
    first = recipe.config["prompt"]["order"] == "question_first"
    return [{"role": "user", "content": [*text, *images] if first else [*images, *text]}]


def stock_answers(
    out: Path, chats: list[list[dict[str, Any]]], layout: LatentLayout
) -> tuple[list[list[int]], list[str]]:
    """Prompt tokens and greedy answers of the exported folder in transformers by itself, without emitted latents."""
    model = AutoModelForImageTextToText.from_pretrained(out).eval()
    processor = AutoProcessor.from_pretrained(out)
    assert model.config.get_text_config()._attn_implementation != "laavit"
    written = latent_tokens(layout.most) if layout.emitted else []
    markup = set(processor.tokenizer.convert_tokens_to_ids(written))
    prompts, texts = [], []
    for chat in chats:
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        done = model.generate(**inputs, max_new_tokens=STEPS + layout.written, do_sample=False)
        length = inputs["input_ids"].shape[1]
        words = [token for token in done[0, length:].tolist() if token not in markup][:STEPS]
        prompts.append(inputs["input_ids"][0].tolist())
        texts.append(processor.decode(words, skip_special_tokens=True).strip())
    return prompts, texts


def check_exported(recipe: Recipe, run: Path, out: Path, model: LaViT, samples: list[Sample]) -> list[str]:
    """The exported folder, in transformers by itself, builds the same prompts and answers alike.

    Returns: the answers.
    """
    prompts = prompts_of(model, recipe, samples)
    ours = model.student.backbone.generate(prompts, STEPS)
    export_run(run, out)
    if model.student.layout.feedback:  # read by laavit alone
        return ours
    chats = [chat_of(sample, recipe) for sample in samples]
    tokens, texts = stock_answers(out, chats, model.student.layout)
    if recipe.config["prompt"]["order"] == "image_first":  # templates that put images first write the other order alike
        assert tokens == [prompt.input_ids.tolist() for prompt in prompts]
        assert texts == ours
    return texts


def check_bridge(out: Path, recipe: Recipe, samples: list[Sample], texts: list[str]) -> None:
    """Under lmms-eval: a batch answers as its prompts do alone, the latents masked or not, and so does stock."""
    chats, settings = [chat_of(sample, recipe) for sample in samples], Settings(max_new_tokens=STEPS, until=())
    for latents in ("on", "off"):
        bridge = Laavit(str(out), latents=latents)
        answers = [answer.text.strip() for answer in bridge.answer(chats, settings)]
        assert answers == (texts if latents == "on" else [bridge.answer([c], settings)[0].text.strip() for c in chats])


def check_cell(cell: Cell, world: World, folder: Path) -> None:
    recipe = Recipe(world.recipe(cell))
    check(recipe)
    last = train_recipe(recipe, folder / "run")
    check_log(folder / "run", recipe)
    check_resumed(recipe, folder / "run", last, folder / "again")
    model, samples = loaded(recipe, last), list(recipe.build("data"))
    texts = check_exported(recipe, folder / "run", folder / "out", model, samples)
    if model.student.layout.feedback or cell.latents in MODES["learned"]:
        check_bridge(folder / "out", recipe, samples, texts)


@pytest.mark.parametrize("cell", pairwise(), ids=str)
def test_a_combination(cell: Cell, world: World, tmp_path: Path) -> None:
    check_cell(cell, world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cell", every(), ids=str)
def test_every_combination(cell: Cell, world: World, tmp_path: Path) -> None:
    check_cell(cell, world, tmp_path)


def test_every_part_has_its_turn() -> None:
    """By name where a part is a name, by type where names are sizes of one part."""
    cells = pairwise()
    assert {name for cell in cells for name in cell.targets} == set(cards("targets"))
    assert {cell.gate for cell in cells} == set(cards("gates"))
    assert {cell.latents for cell in cells} == {"", *cards("latents")}
    assert {cell.student for cell in cells} == set(STUDENTS) and len(cells) == len(STUDENTS) * len(MODES)
    assert {str(dict(cell.extra)) for cell in cells} == {str(extra) for extra in EXTRAS}
    types = {name: card.type for name, card in cards("students").items()}
    assert {spec.get("type") or types[spec["name"]] for _, spec in STUDENTS.values()} >= set(types.values())


# --- pairs ------------------------------------------------------------------------------------------------------------


def step(recipe: Recipe, student: Any, store: TraceStore) -> None:
    """One batch forward and backward: a finite loss of every target, and a gradient."""
    model = LaViT(student, build_gate(recipe), build_targets(recipe, student, store.header)).train()
    builder = student.builder(recipe.build("prompt"))
    dataset = AlignedDataset(recipe.build("data"), builder, model.named_targets, store)
    backbone = student.backbone
    batch = Collate(backbone.family, backbone.tokenizer.pad_token_id)([dataset[index] for index in (0, 1)])
    losses = model(**batch)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    grown = [p.grad for p in model.parameters() if p.grad is not None]
    assert grown and all(torch.isfinite(gradient).all() for gradient in grown)
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("latents", [names[0] for names in MODES.values()])
def test_a_pair_trains_or_is_refused_with_the_reason(latents: str, world: World) -> None:
    """Every target in every latent mode, under an open and a closed gate: there is nothing in between."""
    whole = Recipe(world.recipe(Cell("qwen2_5_vl", latents, "", tuple(cards("targets")))))
    named = {spec: name for name, spec in zip(cards("targets"), whole.config["targets"], strict=True)}
    student = build_model(alone(whole, {}), {}).student
    store = TraceStore(whole.config["traces"]["path"])
    refused, trained = {}, set()
    for gate in ("", "closed"):
        spec = Recipe({"gate": {"name": gate, **GATES.get(gate, {})} if gate else None}).config["gate"]
        for key, name in named.items():
            recipe = alone(whole, {key: whole.config["targets"][key]}, spec)
            try:
                check(recipe)
            except UserError as error:
                refused[name, gate] = str(error)
                continue
            trained.add((name, gate))
            step(recipe, student, store)
    assert all(reason.startswith(f"targets.{key}: ") for (name, _), reason in refused.items()
               for key, own in named.items() if own == name)  # fmt: skip
    for (name, gate), reason in refused.items():
        target = target_of(name)
        wanted = "reads the latents" if not latents and target.needs_latents else "throughout the run"
        assert wanted in reason
        assert wanted == "reads the latents" or (gate == "closed" and target.rows)
    for name in named.values():  # and what reads latents is refused without them
        assert ((name, "") in refused) == (not latents and target_of(name).needs_latents)


def alone(recipe: Recipe, targets: dict[str, Any], gate: dict[str, Any] | None = None) -> Recipe:
    """A recipe with other targets and another gate."""
    found = copy.copy(recipe)
    found.config = {**recipe.config, "targets": targets, "gate": gate}
    return found


# --- without laavit ---------------------------------------------------------------------------------------------------


def test_stock_transformers_runs_every_export(world: World, tmp_path: Path) -> None:
    """In a process that cannot import laavit; by the prompts, answers and chats that this process makes of them."""
    wanted, asked = {}, {}
    for student in STUDENTS:
        raw = world.recipe(Cell(student, "learned", "", ("concept",)))
        recipe = Recipe(apply_overrides(raw, {"train.steps": 1}))
        last = train_recipe(recipe, tmp_path / student)
        out = export_run(tmp_path / student, tmp_path / "out" / student)
        model, samples = loaded(recipe, last), list(recipe.build("data"))
        prompts = prompts_of(model, recipe, samples)
        answers = model.student.backbone.generate(prompts, STEPS)
        wanted[student] = [[prompt.input_ids.tolist() for prompt in prompts], answers]
        asked[str(out)] = [[[str(path) for path in sample.images], sample.question] for sample in samples]
    script, result = tmp_path / "stock.py", tmp_path / "stock.json"
    script.write_text(STOCK)
    command = [sys.executable, "-I", str(script), json.dumps(asked), str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(result.read_text())
    assert {Path(out).name: value for out, value in found.items()} == wanted


STOCK = """
import importlib.abc, json, sys


class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "laavit":
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, Hidden())
try:
    import laavit
except ModuleNotFoundError:
    pass
else:
    sys.exit("laavit can be imported")

from transformers import AutoModelForImageTextToText, AutoProcessor

found = {}
for folder, questions in json.loads(sys.argv[1]).items():
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    prompts, texts = [], []
    for images, question in questions:
        content = [{"type": "image", "path": image} for image in images] + [{"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        done = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        length = inputs["input_ids"].shape[1]
        prompts.append(inputs["input_ids"][0].tolist())
        texts.append(processor.decode(done[0, length:], skip_special_tokens=True).strip())
    found[folder] = [prompts, texts]
assert not [name for name in sys.modules if name.split(".")[0] == "laavit"]
with open(sys.argv[2], "w") as file:
    json.dump(found, file)
""".replace("STEPS", str(STEPS))
