"""LoRA in every family: what learns, merged equals unmerged, small checkpoints that know their base, checkpointing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILY_NAMES
from families.names import patterns
from safetensors.torch import load_file

from laavit.backbones import Backbone
from laavit.engine.strategies import enable_gradient_checkpointing
from laavit.latents import LearnedLatents, latent_tokens
from laavit.model import LaViT
from laavit.registry import UserError
from laavit.students import HFStudent

LORA = {"rank": 4, "dropout": 0.0}


def logits(student: HFStudent, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return LaViT(student).eval().observe(batch).logits


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_step_moves_adapters_latent_rows_and_an_open_projector(workshop: Any, family: str) -> None:
    student = workshop.student(family, lora=LORA)
    moved, names = workshop.moved(student), [name for name, _ in student.model.named_parameters()]
    adapters = {name for name in names if ".lora_" in name}
    text = "text_model" if family in ("idefics3", "smolvlm") else "language_model"
    assert adapters and all(name.startswith(f"model.{text}.layers.") for name in adapters)
    linear = {m for _, m in student.backbone.family.decoder(student.model).named_modules() if hasattr(m, "lora_A")}
    assert 2 * len(linear) == len(adapters) and len(linear) == (12 if family == "qwen3_vl_moe" else 21)
    rows = {name for name in names if "trainable_tokens" in name}
    assert len(rows) == 2  # of the embeddings and of the untied head
    open_ = {name for name in names if not family.startswith("qwen") and re.match(patterns(family)["projector"], name)}
    assert set(moved) == adapters | rows | open_ and bool(open_) == (not family.startswith("qwen"))
    assert all(len(moved[name]) == 4 for name in rows)  # three latents and the separator


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_merged_equals_unmerged_and_a_checkpoint_brings_it_back(workshop: Any, family: str, tmp_path: Path) -> None:
    student = workshop.student(family, lora=LORA, dtype="float64")
    batch = workshop.batch(student)
    start = logits(student, batch)
    workshop.step(student, batch, count=2)
    trained = logits(student, batch)
    assert (trained - start).abs().max() > 1e-3
    student.save(tmp_path)
    again = workshop.student(family, lora=LORA, dtype="float64")
    again.load(tmp_path)
    assert torch.equal(logits(again, batch), trained)
    again.merge()
    torch.testing.assert_close(logits(again, batch), trained, rtol=0, atol=1e-5)  # norms work in float32
    again.save(tmp_path / "whole")
    plain = Backbone.load(str(tmp_path / "whole"), "float64")
    with torch.no_grad():
        states = plain.forward(batch)
        torch.testing.assert_close(plain.logits(states[batch.labels != -100]), trained, rtol=0, atol=1e-5)
    assert {n: p.shape for n, p in plain.model.named_parameters()} == {
        n: p.shape for n, p in workshop.student(family).model.named_parameters()
    }


def test_the_same_under_tied_embeddings(lab: Any, samples: Any, tmp_path: Path) -> None:
    """Rows of a tied table learn once, and the head reads what the embeddings read."""
    student = HFStudent(str(lab.folder), "float64", lora={**LORA, "rslora": True, "dora": True})
    student.setup(LearnedLatents(4, "mean", 0.5), torch.Generator().manual_seed(3))
    rows = [name for name, _ in student.model.named_parameters() if "trainable_tokens" in name]
    assert rows == ["model.language_model.embed_tokens.token_adapter.trainable_tokens_delta.default"]
    model = lab.model({}, student=student)
    batch = lab.batch(model, samples)
    optimizer = torch.optim.AdamW([p for _, p in model.trainable_parameters()], lr=1e-2)
    model(batch)["loss"].backward()
    optimizer.step()
    trained = logits(student, batch)
    model.student.save(tmp_path)
    student.merge()
    tables = [student.model.get_input_embeddings().weight, student.model.get_output_embeddings().weight]
    assert tables[0] is tables[1]
    ids = student.backbone.tokenizer.convert_tokens_to_ids(latent_tokens(4))
    assert torch.equal(
        tables[0][ids], next(v for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if "token" in k)
    )
    torch.testing.assert_close(logits(student, batch), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_checkpointing_changes_nothing(workshop: Any, family: str) -> None:
    found = []
    for checkpointing in (False, True):
        student = workshop.student(family, lora={"rank": 4, "dropout": 0.1}, dtype="float64")
        model = LaViT(student).train()
        if checkpointing:
            enable_gradient_checkpointing(model)
        torch.manual_seed(0)  # of the dropout
        loss = model(workshop.batch(student))["loss"]
        loss.backward()
        found.append({"loss": loss.detach(), **{n: p.grad for n, p in model.trainable_parameters()}})
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_a_checkpoint_is_small_and_knows_its_base(workshop: Any, tmp_path: Path) -> None:
    student = workshop.student("smolvlm", lora=LORA)
    student.save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    held = load_file(tmp_path / "adapter_model.safetensors") | load_file(tmp_path / "trained.safetensors")
    learned = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    assert sum(tensor.numel() for tensor in held.values()) == learned
    base = json.loads((tmp_path / "base.json").read_text())
    path = str(workshop.folder_of("smolvlm"))
    assert base == {"path": path, "weights_sha256": Backbone.load(path).weights_digest()}
    other = workshop.student("smolvlm", lora=LORA)
    other.base_sha256 = other.adapters.sha256 = "0" * 64
    with pytest.raises(UserError, match=f"belong to the base '{path}' with other weights"):
        other.load(tmp_path)
    with pytest.raises(UserError, match="holds another model"):
        workshop.student("smolvlm", lora={**LORA, "rank": 2}).load(tmp_path)
    with pytest.raises(UserError, match=r"holds another model: .*connector"):
        workshop.student("smolvlm", lora=LORA, freeze=("vision", "projector")).load(tmp_path)
    with pytest.raises(UserError, match=r"holds adapters, and this student has none"):
        workshop.student("smolvlm").load(tmp_path)
    (tmp_path / "whole").mkdir()
    workshop.student("smolvlm").save(tmp_path / "whole")
    with pytest.raises(UserError, match=r"holds whole weights, and this student has adapters"):
        student.load(tmp_path / "whole")


def test_sixteen_bit_bases_have_float32_adapters(workshop: Any) -> None:
    """What learns is in float32, as the optimizer asks; the base stays small."""
    student = workshop.student("llava_onevision", lora=LORA, dtype="bfloat16", freeze=("vision", "projector"))
    kinds = {p.requires_grad: p.dtype for p in student.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        workshop.step(student)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (
            r"\.1\..*(q_proj|v_proj)",
            {"language_model.layers.1.self_attn.q_proj", "language_model.layers.1.self_attn.v_proj"},
        ),
        (["projector"], {"multi_modal_projector.linear_1", "multi_modal_projector.linear_2"}),
        (["tower", r"layers\.0\.mlp\.up_proj"], None),
    ],
)
def test_targets(workshop: Any, targets: Any, names: set[str] | None) -> None:
    """Expressions look at the decoder alone: the tower's q_proj gets none unless its part is named."""
    student = workshop.student("internvl", lora={**LORA, "targets": targets}, freeze=())
    found = {n.removeprefix("model.") for n, m in student.model.named_modules() if hasattr(m, "lora_A")}
    if names is None:
        tower = {n for n in found if n.startswith("vision_tower.encoder.layer.")}
        assert found - tower == {"language_model.layers.0.mlp.up_proj"} and len(tower) == 12
    else:
        assert found == names
    moved = set(workshop.moved(student))
    assert not any("base_layer" in name or "language_model.norm" in name for name in moved)
    # A part that gets adapters does not learn in full, one that gets none and is not frozen does.
    assert any(n.startswith("model.vision_tower") and "lora" not in n for n in moved) == ("tower" not in targets)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, r"lora\.rank: got 0"),
        ({"alpha": 0}, r"lora\.alpha: got 0"),
        ({"dropout": 1.0}, r"lora\.dropout: got 1"),
        ({"targets": []}, r"lora\.targets: got none"),
        ({"targets": "visoin"}, r"lora\.targets: 'visoin' fits no linear layer of the decoder.*did you mean 'vision'"),
        ({"targets": ["q_proj("]}, r"lora\.targets: 'q_proj\(' is no part and no regular expression"),
    ],
)
def test_what_is_refused(workshop: Any, lora: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        workshop.student("smolvlm", lora=lora)


def test_without_latents_there_are_adapters_alone(workshop: Any) -> None:
    student = workshop.student("qwen2_vl", latents=0, lora=LORA)
    assert all(".lora_" in name for name in workshop.moved(student))


def test_the_seed_fixes_the_first_adapters(workshop: Any) -> None:
    """And drawing them moves no other generator."""
    drawn, states = [], []
    for lora in (None, LORA, LORA):
        torch.manual_seed(1)
        adapters = workshop.student("smolvlm", lora=lora).adapters
        drawn.append(float(torch.rand(1)))
        states.append(adapters.state() if adapters else {})
    assert len(set(drawn)) == 1 and states[1].keys() == states[2].keys()
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[1])
