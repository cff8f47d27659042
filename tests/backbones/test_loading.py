"""Loading: placement, quantisation, bounds; what does not work is one sentence before the weights are read."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from laavit.attention import AttentionContext
from laavit.backbones import Backbone, PromptSettings, base, collate, loading
from laavit.backbones.loading import quantization_config
from laavit.recipe import cards, checked
from laavit.registry import TEACHERS, UserError
from laavit.structures import Sample
from laavit.teachers import HFTeacher

Folder = Callable[[str], Path]


@torch.no_grad()
def states(backbone: Backbone, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and mean rows of a batch."""
    items = [backbone.builder(PromptSettings()).encode(sample, sample.answer) for sample in samples]
    context = AttentionContext(rows=torch.arange(40, 44).expand(len(items), -1))
    hidden = backbone.forward(collate(items, backbone.family, backbone.tokenizer.pad_token_id), context)
    return hidden, context.mean_rows()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"model.visual": "cpu", "model": "cpu", "lm_head": "cpu"}])
def test_a_model_spread_over_devices_is_the_same(device_map: Any, folder_of: Folder, samples: list[Sample]) -> None:
    plain = Backbone.load(str(folder_of("qwen3_vl")))
    spread = Backbone.load(str(folder_of("qwen3_vl")), device_map=device_map)
    assert spread.device == torch.device("cpu")
    for one, two in zip(states(plain, samples), states(spread, samples), strict=True):
        assert torch.equal(one, two)
    prompts = [plain.builder(PromptSettings()).prompt_of(sample) for sample in samples]
    assert spread.generate(prompts, 4) == plain.generate(prompts, 4)


def test_layers_on_the_disk(folder_of: Folder, samples: list[Sample], tmp_path: Path) -> None:
    names = ["model.visual", "model.language_model.embed_tokens", "model.language_model.norm", "lm_head"]
    device_map = dict.fromkeys([*names, "model.language_model.rotary_emb", "model.language_model.layers.0"], "cpu")
    device_map |= {"model.language_model.layers.1": "disk", "model.language_model.layers.2": "disk"}
    plain, spread = (Backbone.load(str(folder_of("qwen3_vl")), device_map=given) for given in (None, device_map))
    assert any(p.device.type == "meta" for p in spread.model.parameters()) and spread.device == torch.device("cpu")
    for one, two in zip(states(plain, samples), states(spread, samples), strict=True):
        assert torch.equal(one, two)


def test_what_cannot_be_placed_or_quantised_is_one_sentence(folder_of: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(folder_of("qwen3_vl"))
    with pytest.raises(UserError, match=r"device_map: got 'autom'; .*did you mean 'auto'"):
        Backbone.load(folder, device_map="autom")
    with pytest.raises(UserError, match=r"no quantization is called '4bits'; .*did you mean '4bit'"):
        Backbone.load(folder, quantization="4bits")
    with pytest.raises(UserError, match=r"has no 'load_in_4bits'; .*did you mean 'load_in_4bit'"):
        Backbone.load(folder, quantization={"load_in_4bits": True})
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    for spec in ("8bit", {"load_in_4bit": True}):
        with pytest.raises(UserError, match="needs bitsandbytes, which is not installed"):
            Backbone.load(folder, quantization=spec)
    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="quantization: "):
        Backbone.load(folder, quantization={"load_in_4bit": True, "load_in_8bit": True})
    with pytest.raises(UserError, match="quantization: "):
        Backbone.load(folder, quantization={"load_in_4bit": "yes", "bnb_4bit_compute_dtype": "float23"})


def test_what_is_refused_is_refused_before_the_weights_are_read(
    folder_of: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the weights are read")

    monkeypatch.setattr(base, "read_model", never)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match=r"can be read from '.*': the model is of type 'qwen2', .*'qwen2_vl'"):
        Backbone.load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(UserError, match="no vision-language model can be read from") as caught:
        Backbone.load(str(tmp_path))  # no processor
    assert "\n" not in str(caught.value)
    for given in ({"dtype": "half"}, {"device_map": "all"}, {"quantization": "2bit"}, {"min_pixels": -1}):
        with pytest.raises(UserError):
            Backbone.load(str(folder_of("qwen3_vl")), **given)
    with pytest.raises(UserError, match="Idefics3ImageProcessor does not scale images by their area"):
        Backbone.load(str(folder_of("idefics3")), max_pixels=1000)


def test_names_become_arguments_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    assert quantization_config(None, torch.float32) is None
    eight, four = (quantization_config(name, torch.bfloat16) for name in ("8bit", "4bit"))
    assert eight is not None and eight.load_in_8bit and not eight.load_in_4bit
    assert four is not None and four.load_in_4bit and four.bnb_4bit_quant_type == "nf4"
    assert four.bnb_4bit_compute_dtype is torch.bfloat16
    own = quantization_config({"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16"}, torch.bfloat16)
    assert own is not None and own.bnb_4bit_compute_dtype is torch.float16


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_a_quantised_teacher_answers_and_is_recorded(name: str, folder_of: Folder, samples: list[Sample]) -> None:
    folder = str(folder_of("qwen2_5_vl"))
    teacher = HFTeacher(folder, device="cpu", quantization=name)
    weight = teacher.backbone.model.model.language_model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr]
    assert weight.dtype == {"8bit": torch.int8, "4bit": torch.uint8}[name]
    if name == "4bit":
        return  # on a processor bitsandbytes computes with widths of 64 and more only
    (rough, rows), (exact, _) = states(teacher.backbone, samples), states(Backbone.load(folder), samples)
    similar = torch.nn.functional.cosine_similarity(rough, exact, dim=-1).mean()
    assert float(similar) > 0.8 and not torch.equal(rough, exact) and torch.isfinite(rows).all()


def test_teachers_of_the_registry_name_arguments_that_exist() -> None:
    """Every card's arguments are checked against its class, placement and quantisation included."""
    known = cards("teachers")
    for name in ("qwen2_vl_7b", "qwen3_vl_8b", "qwen3_vl_32b", "smolvlm2_2_2b", "smolvlm_256m", "idefics3_8b"):
        card = known[name]
        more = {"device_map": "auto", "quantization": {"load_in_4bit": True}}
        args = checked("teacher", TEACHERS.get(card.type), {**card.args, **more})
        assert args["dtype"] == "bfloat16" and args["device_map"] == "auto"
        assert card.source == f"https://huggingface.co/{card.args['path']}"
