"""Runs with LoRA: resumed to the same bits, exported merged as a stock folder, exported apart as stock peft's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILY_NAMES
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from laavit.backbones import Backbone, PromptSettings
from laavit.cli import run
from laavit.commands.common import run_recipe
from laavit.commands.export import export_run
from laavit.model import build_model
from laavit.registry import UserError
from laavit.structures import Sample

WORDS = ["--student.lora.rank", "4", "--student.lora.dropout", "0.1", "--train.lr", "0.02"]
#: what a step of these models leaves in the float32 of their norms
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def adapted(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps with adapters; checkpoints after the second and the third."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    assert run("train", [str(project), *WORDS, "--work-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def unmerged(adapted: Path) -> Any:
    model = build_model(run_recipe(adapted), {"width": 32})
    model.load_checkpoint(adapted / "checkpoints" / "iter_000003")
    return model.eval()


def answers(backbone: Backbone, samples: list[Sample]) -> tuple[list[str], torch.Tensor]:
    """Greedy answers to the export's own prompts, and the logits of their first tokens."""
    prompts = [backbone.builder(PromptSettings("You look closely."), 4).prompt_of(sample) for sample in samples]
    with torch.no_grad():
        inputs = [{**p.vision, **backbone.family.text_inputs(p.input_ids[None])} for p in prompts]
        logits = [
            backbone.model(input_ids=p.input_ids[None], position_ids=p.position_ids[:, None], **given).logits[0, -1]
            for p, given in zip(prompts, inputs, strict=True)
        ]
    return [backbone.generate([prompt], 7)[0] for prompt in prompts], torch.stack(logits)


def test_a_run_with_adapters_resumes_to_the_same_bits(adapted: Path, project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(adapted, copy)
    shutil.rmtree(copy / "checkpoints" / "iter_000003")
    assert run("train", [str(project), *WORDS, "--work-dir", str(copy), "--resume"]) == 0
    one, two = (folder / "checkpoints" / "iter_000003" for folder in (adapted, copy))
    files = sorted(path.name for path in one.iterdir())
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    assert files == sorted(path.name for path in two.iterdir())
    assert [name for name in files if (one / name).read_bytes() != (two / name).read_bytes()] == []


def test_merged_is_a_stock_folder(adapted: Path, unmerged: Any, samples: list[Sample], tmp_path: Path) -> None:
    out = export_run(adapted, tmp_path / "out")
    files = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "chat_template.jinja", "laavit.json"} <= files
    assert not {"adapter_config.json", "adapter_model.safetensors", "base.json", "trained.safetensors"} & files
    stock = AutoModelForImageTextToText.from_pretrained(out).eval()
    assert not [name for name, _ in stock.named_parameters() if "lora" in name]
    found, logits = answers(Backbone(stock, AutoProcessor.from_pretrained(out)), samples)
    wanted, expected = answers(unmerged.student.backbone, samples)
    assert found == wanted
    torch.testing.assert_close(logits, expected, **CLOSE)
    export_run(adapted, tmp_path / "out")  # and once more over it
    assert json.loads((out / "laavit.json").read_text())["merged_into"]["path"] == unmerged.student.path


def test_apart_is_a_folder_of_stock_peft(adapted: Path, unmerged: Any, samples: list[Sample], tmp_path: Path) -> None:
    assert run("export", [str(adapted), str(tmp_path / "out"), "--adapters", "apart"]) == 0
    out = tmp_path / "out"
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert size < 60_000 and not (out / "config.json").exists()
    base = AutoModelForImageTextToText.from_pretrained(
        json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    before = answers(Backbone(base.eval(), AutoProcessor.from_pretrained(out)), samples)[1]
    stock = PeftModel.from_pretrained(base, out).eval()
    found, logits = answers(Backbone(stock.get_base_model(), AutoProcessor.from_pretrained(out)), samples)
    wanted, expected = answers(unmerged.student.backbone, samples)
    assert found == wanted
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert (before - expected).abs().max() > 0.1
    assert "resize_token_embeddings" not in (out / "README.md").read_text()  # spare rows held the new tokens
    text = AutoProcessor.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], add_generation_prompt=True, tokenize=False
    )
    assert "You look closely." in text and text.endswith("<|latent_4|><|latent_end|>")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_apart_in_every_family(workshop: Any, family: str, tmp_path: Path) -> None:
    """Bases without spare rows, an open projector where that is a module of its own."""
    lone = family == "llava_onevision"  # its learned newline is a parameter of the whole model
    student = workshop.student(family, lora={"rank": 4}, freeze=("vision", *(("projector",) if lone else ())))
    batch = workshop.batch(student)
    workshop.step(student, batch)
    student.adapters.save_apart(tmp_path)
    base = AutoModelForImageTextToText.from_pretrained(workshop.folder_of(family))
    base.resize_token_embeddings(student.model.get_input_embeddings().weight.shape[0], mean_resizing=False)
    with torch.no_grad():
        plain = Backbone(base.eval(), student.backbone.processor)
        before = plain.logits(plain.forward(batch)[batch.labels != -100])
    adapted = PeftModel.from_pretrained(base, tmp_path).eval()
    stock = Backbone(adapted.get_base_model(), student.backbone.processor)
    student.model.eval()
    with torch.no_grad():
        own, found = (b.logits(b.forward(batch)[batch.labels != -100]) for b in (student.backbone, stock))
        with adapted.disable_adapter():  # a projector that learned is a module of the adapter's own
            disabled = stock.logits(stock.forward(batch)[batch.labels != -100])
    assert torch.equal(disabled, before) and (own - before).abs().max() > 1e-2
    torch.testing.assert_close(found, own, **CLOSE)
    if lone:
        with pytest.raises(UserError, match=r"adapters apart: model\.image_newline learned in full"):
            workshop.student(family, lora={"rank": 4}).adapters.save_apart(tmp_path)


def test_what_export_refuses(adapted: Path, trained: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("export", [str(trained), str(tmp_path / "out"), "--adapters", "apart"]) == 2
    assert "trained without adapters" in capsys.readouterr().err
    copy = tmp_path / "run"
    shutil.copytree(adapted, copy)
    recipe = json.loads((copy / "recipe.json").read_text())
    other = tmp_path / "base"
    shutil.copytree(recipe["student"]["path"], other)
    model = AutoModelForImageTextToText.from_pretrained(other)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    model.save_pretrained(other)
    recipe["student"]["path"] = str(other)
    (copy / "recipe.json").write_text(json.dumps(recipe))
    assert run("export", [str(copy), str(tmp_path / "out")]) == 2
    assert "belong to the base" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_sixteen_bits_train_under_autocast(project: Path, tmp_path: Path, capsys: Any) -> None:
    words = [str(project), *WORDS, "--student.dtype", "bfloat16", "--train.steps", "1"]
    assert run("train", [*words, "--work-dir", str(tmp_path / "one")]) == 2
    assert "need autocast: train.precision='bf16'" in capsys.readouterr().err
    assert run("train", [*words, "--train.precision", "bf16", "--work-dir", str(tmp_path / "two")]) == 0
    out = export_run(tmp_path / "two", tmp_path / "out")
    assert AutoModelForImageTextToText.from_pretrained(out).dtype == torch.bfloat16
