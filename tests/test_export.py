"""An export runs in stock transformers without laavit: the same tokens, the same logits, the same sequence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from laavit.backbones import Backbone, PromptSettings, collate
from laavit.backbones.chat import IGNORED
from laavit.cli import run
from laavit.commands.common import run_recipe
from laavit.commands.export import export_run, exported_template
from laavit.data import VisualCoT
from laavit.latents import LatentLayout, layout_of
from laavit.model import build_model
from laavit.registry import UserError
from laavit.structures import Encoded, Role

STEPS = 7
#: What a user without laavit does; laavit itself is hidden from this process.
STOCK = """
import importlib.abc, json, sys
import numpy as np


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

folder, out, questions = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)
arrays, texts = {}, []
for index, (image, question) in enumerate(questions):
    content = [{"type": "image", "path": image}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    done = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    length = inputs["input_ids"].shape[1]
    arrays[f"prompt{index}"] = inputs["input_ids"][0].numpy()
    arrays[f"answer{index}"] = done.sequences[0, length:].numpy()
    arrays[f"logits{index}"] = np.stack([step[0].float().numpy() for step in done.logits])
    texts.append(processor.decode(done.sequences[0, length:], skip_special_tokens=True).strip())
    own = [{"role": "system", "content": [{"type": "text", "text": "blue"}]}, *chat]
    texts.append(processor.apply_chat_template(own, add_generation_prompt=True, tokenize=False))
assert not [name for name in sys.modules if name.split(".")[0] == "laavit"]
np.savez(out, texts=np.array(texts), **arrays)
""".replace("STEPS", str(STEPS))


@pytest.fixture(scope="module")
def export(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(trained, tmp_path_factory.mktemp("export") / "out")


@pytest.fixture(scope="module")
def stock(export: Path, project: Path) -> Any:
    """What stock transformers, in a process that cannot import laavit, makes of the exported folder."""
    samples = VisualCoT(project.parent / "data.json", project.parent / "images")
    questions = [(str(sample.images[0]), sample.question) for sample in samples]
    out = export.parent / "stock.npz"
    script = export.parent / "stock.py"
    script.write_text(STOCK)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", str(script), str(export), str(out), json.dumps(questions)]
    done = subprocess.run(command, env=environment, cwd=export.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="module")
def trained_model(trained: Path) -> Any:
    model = build_model(run_recipe(trained), {"width": 32})
    model.load_checkpoint(trained / "checkpoints" / "iter_000003")
    return model


def prompts(model: Any, project: Path) -> list[Encoded]:
    builder = model.student.builder(PromptSettings(system="You look closely."))
    samples = VisualCoT(project.parent / "data.json", project.parent / "images")
    return [builder.prompt_of(sample) for sample in samples]


def test_stock_transformers_builds_the_training_sequence(stock: Any, trained_model: Any, project: Path) -> None:
    """System prompt supplied, latents and separator after the generation prompt."""
    for index, prompt in enumerate(prompts(trained_model, project)):
        assert stock[f"prompt{index}"].tolist() == prompt.input_ids.tolist()
        own = str(stock["texts"][2 * index + 1])
        assert own.count("system\n") == 1 and "You look closely." not in own
        assert own.endswith("assistant\n<|latent_1|><|latent_2|><|latent_3|><|latent_4|><|latent_end|>")


def test_stock_transformers_generates_the_same_tokens(stock: Any, trained_model: Any, project: Path) -> None:
    trained_model.eval()
    found = trained_model.student.backbone.generate(prompts(trained_model, project), STEPS)
    assert found == [str(text) for text in stock["texts"][::2]]
    assert len(set(found)) > 1  # the images and questions matter


def test_training_logits_are_inference_logits(stock: Any, trained_model: Any, project: Path) -> None:
    """Teacher forcing through the training code, against the steps of stock generation with a cache."""
    trained_model.train()  # past its warm-up the gate is open: no shift between training and inference
    trained_model.set_step(10)
    items = []
    for index, prompt in enumerate(prompts(trained_model, project)):
        answer = torch.from_numpy(stock[f"answer{index}"])
        ids = torch.cat([prompt.input_ids, answer])
        labels = torch.full(ids.shape, IGNORED)
        labels[len(prompt.input_ids) - 1 : -1] = answer
        items.append(
            replace(
                prompt,
                input_ids=ids,
                labels=labels,
                roles=torch.cat([prompt.roles, torch.full(answer.shape, int(Role.ANSWER), dtype=torch.uint8)]),
                position_ids=trained_model.student.backbone.family.extend(prompt.position_ids, len(answer)),
            )
        )
    with torch.no_grad():
        output = trained_model.observe(collate(items, trained_model.student.backbone.family, 0))
    wanted = torch.cat([torch.from_numpy(stock[f"logits{index}"]) for index in range(len(items))])
    assert (output.logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch.equal(output.logits.argmax(-1), output.labels)


def test_an_export_holds_no_trace_of_laavit_but_its_card(export: Path, trained: Path) -> None:
    texts = {path.name: path.read_text() for path in export.iterdir() if path.suffix in (".json", ".jinja", ".txt")}
    card = json.loads(texts.pop("laavit.json"))
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= set(texts)
    for name, text in texts.items():
        assert "laavit" not in text, name
    assert card["latents"] == 4 and card["system"] == "You look closely." and card["step"] == "iter_000003"
    assert not {"heads.safetensors", "optimizer.safetensors", "state.json"} & {p.name for p in export.iterdir()}
    assert not any(path.suffix in (".bin", ".pt", ".pth", ".pkl") for path in export.rglob("*"))


def test_an_export_opens_as_a_backbone_with_the_same_weights(export: Path, trained_model: Any) -> None:
    assert Backbone.load(str(export)).weights_digest() == trained_model.student.backbone.weights_digest()


def test_exporting_again_and_elsewhere(export: Path, trained: Path, tmp_path: Path, capsys: Any) -> None:
    first = {path.name: path.read_bytes() for path in export.iterdir()}
    assert run("export", [str(trained), str(tmp_path / "two")]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()} == first
    export_run(trained, tmp_path / "two")  # an export may be replaced
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is no export"):
        export_run(trained, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert run("export", [str(trained), "--checkpoint", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.rstrip().splitlines()[-1].startswith("error: ")


def test_a_run_without_a_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "recipe.json", tmp_path / "recipe.json")
    with pytest.raises(UserError, match="holds no checkpoint"):
        export_run(tmp_path, tmp_path / "export")


def test_naive_sft_exports_without_latents(project: Path, tmp_path: Path) -> None:
    words = ["--targets", "null", "--latents", "null", "--gate", "null", "--train.steps", "1", "--prompt.system", ""]
    assert run("train", [str(project), *words, "--work-dir", str(tmp_path / "run")]) == 0
    out = export_run(tmp_path / "run", tmp_path / "out")
    template = (out / "chat_template.jinja").read_text()
    assert (
        "latent" not in template
        and template == (tmp_path / "run/checkpoints/iter_000001/chat_template.jinja").read_text()
    )
    assert json.loads((out / "laavit.json").read_text())["latents"] == 0


def test_a_system_prompt_with_quotes_and_braces_survives(lab: Any) -> None:
    system = 'It\'s "quoted", {{ braces }} {% and %} a newline\nand ünicode.'
    backbone = lab.student(2).backbone
    template = exported_template(backbone.processor.chat_template, system, 2)
    chat = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    text = backbone.processor.apply_chat_template(chat, chat_template=template, tokenize=False)
    assert text.startswith(f"<|im_start|>system\n{system}<|im_end|>\n") and "<|latent" not in text


def test_emitted_latents_are_left_to_the_model(project: Path, tmp_path: Path) -> None:
    """The template ends with the assistant's header; the card says who writes what follows."""
    words = ["--latents", "emitted", "--latents.count", "[2, 3]", "--targets", "null", "--train.steps", "1"]
    assert run("train", [str(project), *words, "--work-dir", str(tmp_path / "run")]) == 0
    [first] = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()][:1]
    out = export_run(tmp_path / "run", tmp_path / "out")
    assert "latent" not in (out / "chat_template.jinja").read_text()
    card = json.loads((out / "laavit.json").read_text())
    assert card["latents"] == 3 and layout_of(card) == LatentLayout(3, 2, emitted=True)
    backbone = Backbone.load(str(out))
    assert backbone.layout == layout_of(card) and backbone.tokenizer.convert_tokens_to_ids("<|latent_3|>") is not None
    assert first["loss"] == pytest.approx(first["ntp"] + first["emit"])
