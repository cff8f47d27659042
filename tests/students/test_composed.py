"""Students of a tower and a language model: each part as it was by itself, the whole a stock LLaVA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from families.parts import spread, tokenizer
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from laavit.backbones import Backbone, PromptSettings, collate
from laavit.backbones.encoders import timm_model
from laavit.cli import run
from laavit.latents import LearnedLatents, latent_tokens
from laavit.registry import UserError
from laavit.structures import Encoded, Sample
from laavit.students import ComposedStudent, HFStudent
from laavit.students.lora import LoraSettings

TINY = {"patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2}
#: a tower -> its name, options for it, how many tokens of it come before the patches, and how many of them stay
TOWERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "class token": ("timm:vit_tiny_patch16_224", TINY, 0),
    "registers": ("timm:vit_tiny_patch16_224", {**TINY, "reg_tokens": 3}, 3),
    "patches alone": ("timm:vit_tiny_patch16_224", {**TINY, "class_token": False, "global_pool": "avg"}, 0),
    "open_clip": (
        "open_clip:ViT-B-32",
        {
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16},
            "text_cfg": {"width": 16, "heads": 2, "layers": 1},
        },
        0,
    ),
}
QWEN = (
    "{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif -%}{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
LLAMA = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
SYSTEM = PromptSettings(system="You are a helpful assistant.")
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Compose = Callable[..., ComposedStudent]


def write_language(folder: Path, kind: str, template: str | None = None) -> Path:
    """A tiny causal language model that chats: Qwen2 with tied embeddings, or Llama, which has no padding token."""
    if kind == "qwen":
        words = tokenizer(
            ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
        )
        model: Any = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(words), tie_word_embeddings=True, **SHAPE))
        words.chat_template = template or QWEN
    else:
        special = ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        words = tokenizer(special, bos="<|begin|>", writes_bos=True, eos_token="<|eot_id|>")
        if kind.startswith("gemma"):
            caps = {"attn_logit_softcapping": None, "final_logit_softcapping": 2.0} if kind == "gemma" else {}
            model = Gemma2ForCausalLM(Gemma2Config(vocab_size=len(words), head_dim=8, **caps, **SHAPE))
        elif kind == "lfm2":
            kinds = ["full_attention", "conv", "full_attention"]
            model = Lfm2ForCausalLM(Lfm2Config(vocab_size=len(words), layer_types=kinds, **SHAPE))
        elif kind == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_layer=1, n_head=2, n_embd=32))
        else:
            model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words) + 20, **SHAPE))
        words.chat_template = template or LLAMA
    spread(model, 1)
    model.generation_config.update(eos_token_id=words.eos_token_id)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda kind: write_language(tmp_path_factory.mktemp("language") / kind, kind))


@pytest.fixture(scope="module")
def composed(language: Callable[[str], Path]) -> Compose:
    def compose(tower: str, kind: str = "qwen", dtype: str = "float64", **arguments: Any) -> ComposedStudent:
        name, options, _ = TOWERS[tower]
        given = {"image_size": 32, "pretrained": False, "options": options, "dtype": dtype, **arguments}
        return ComposedStudent(name, str(language(kind)), **given)

    return compose


def vision_of(student: ComposedStudent, sample: Sample) -> Encoded:
    return student.builder(SYSTEM).prompt_of(sample)


@pytest.mark.parametrize("tower", TOWERS)
def test_the_projector_reads_the_towers_own_states(tower: str, composed: Compose, samples: list[Sample]) -> None:
    """The library's own model, made of the same seed, gives what the student's tower gives, registers included."""
    student = composed(tower, layer=-1)
    name, options, left = TOWERS[tower]
    torch.manual_seed(0)
    pixels = vision_of(student, samples[2]).vision["pixel_values"].double()
    with torch.no_grad():
        if tower == "open_clip":
            visual: Any = open_clip.create_model("ViT-B-32", **options).visual.double().eval()
            found = visual.forward_intermediates(pixels, indices=1, intermediates_only=True, output_fmt="NLC")
            states = found["image_intermediates"][0]
        else:
            model: Any = timm_model(name.removeprefix("timm:"), None, False, {"img_size": 32, **options})
            model.double().eval()
            prefix = model.num_prefix_tokens
            states = model.forward_intermediates(pixels, indices=1, output_fmt="NLC")[1][0]
            if left:
                both = model.forward_intermediates(pixels, indices=1, output_fmt="NLC", return_prefix_tokens=True)
                states = torch.cat([both[1][0][1][:, prefix - left :], states], 1)
        wanted = student.model.model.multi_modal_projector(states)
        features = student.backbone.family.image_features(student.model, {"pixel_values": pixels})
    assert len(features) == len(samples[2].images) == 2
    for one, other in zip(features, wanted, strict=True):
        assert one.shape == (left + 16, 32) and other.std() > 1e-4
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["qwen", "llama"])
def test_text_alone_is_the_language_models_own(kind: str, composed: Compose, language: Callable[[str], Path]) -> None:
    student = composed("class token", kind)
    own: Any = AutoModelForCausalLM.from_pretrained(language(kind), dtype=torch.float64)
    words = AutoTokenizer.from_pretrained(language(kind))
    ids = words("What colour is left of the red circle?", return_tensors="pt").input_ids
    with torch.no_grad():
        found, wanted = student.model(ids).logits, own(ids).logits
    assert (found[..., : wanted.shape[-1]] - wanted).abs().max() < 1e-12 and wanted.std() > 0.1
    tied = student.model.lm_head.weight is student.model.get_input_embeddings().weight
    assert tied == (kind == "qwen")


@pytest.mark.parametrize("kind", ["qwen", "llama"])
@pytest.mark.parametrize("order", ["image_first", "question_first"])
def test_the_chat_is_the_language_models_own(
    kind: str, order: str, composed: Compose, language: Callable[[str], Path], samples: list[Sample]
) -> None:
    """Turns, their ends, system prompt and generation prompt as its own template writes them, images in their place."""
    student, own = composed("patches alone", kind), AutoTokenizer.from_pretrained(language(kind))
    sample, image = samples[2], "<image>" * 16 + "\n"
    user = image * 2 + sample.question if order == "image_first" else sample.question + image * 2
    for system in ("You look closely.", ""):
        item = student.builder(PromptSettings(system=system, order=order)).encode(sample, "no")
        chat = [{"role": "system", "content": system}] if system else []
        chat += [{"role": "user", "content": user}]
        text = own.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert student.backbone.tokenizer.decode(item.input_ids) == text + "no" + own.eos_token
        assert [span.start for span in item.spans] == [i.start for i in item.spans] and len(item.spans) == 2
    words = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]  # texts stay texts
    template = student.backbone.processor.chat_template
    assert own.apply_chat_template(words, chat_template=template, tokenize=False) == own.apply_chat_template(
        words, tokenize=False
    )


def test_a_template_without_a_system_role_gets_it_before_the_question(tmp_path: Path, samples: list[Sample]) -> None:
    refuses = "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}"
    folder = write_language(tmp_path, "qwen", refuses + QWEN)
    student = ComposedStudent(TOWERS["class token"][0], str(folder), 32, options=TINY, pretrained=False)
    prompt = vision_of(student, samples[0])
    text = student.backbone.tokenizer.decode(prompt.input_ids).replace("<image>" * 16, "<image>")
    assert text.endswith(
        "user\nYou are a helpful assistant.\n\n<image>\nWhat colour is the shape?<|im_end|>\n<|im_start|>assistant\n"
    )


def no_attention(module: Any, query: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Patches that do not see each other: a token's input then depends on its own pixels alone."""
    return torch.zeros_like(query).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("tower", TOWERS)
def test_a_patch_of_the_image_is_one_token(tower: str, composed: Compose) -> None:
    """Of all inputs of the decoder one changes, the one that the span's cell says."""
    AttentionInterface.register("none", no_attention)
    AttentionMaskInterface.register("none", sdpa_mask)
    student = copy.deepcopy(composed(tower))
    student.model.set_attn_implementation({"text_config": "laavit", "vision_config": "none"})
    builder, plain = student.builder(SYSTEM), Image.new("RGB", (32, 32), (90, 120, 150))
    sample = Sample("s", (Path("0"),), "what?", "no")

    def inputs(image: Image.Image) -> Tensor:
        item = builder.prompt_of(sample, [image])
        seen: list[Tensor] = []
        hook = student.backbone.family.decoder(student.model).register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        with torch.no_grad():
            student(collate([item], student.backbone.family, 0))
        hook.remove()
        return seen[0][0]

    before, (span,) = inputs(plain), builder.prompt_of(sample, [plain]).spans
    assert (span.tile.height, span.tile.width, span.lead) == (4, 4, TOWERS[tower][2])
    for cell in (0, 3, 6, 9, 13):
        changed = plain.copy()
        changed.paste((255, 0, 0), (cell % 4 * 8 + 2, cell // 4 * 8 + 2, cell % 4 * 8 + 6, cell // 4 * 8 + 6))
        moved = (inputs(changed) - before).abs().amax(-1)
        assert moved.nonzero().flatten().tolist() == [int(span.positions()[cell])]


RECIPE = "student = dict(type='ComposedStudent', tower={tower!r}, language={language!r}, image_size=32, {more})\n"


@pytest.fixture(scope="module")
def recipe(project: Path, language: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of ``project`` (latents, cosine gate, concept, trajectory) for a composed student with registers."""
    lines = [line for line in project.read_text().splitlines() if not line.startswith("student")]
    name, options, _ = TOWERS["registers"]
    more = f"pretrained=False, options={options!r}"
    text = RECIPE.format(tower=name, language=str(language("llama")), more=more)
    path = tmp_path_factory.mktemp("composed") / "cfg.py"
    path.write_text(text + "\n".join(lines))
    return path


@pytest.fixture(scope="module")
def trained(recipe: Path) -> Path:
    folder = recipe.parent / "run"
    assert run("train", [str(recipe), "--train.steps", "2", "--work-dir", str(folder)]) == 0
    return folder


def test_training_moves_what_is_not_frozen(trained: Path, composed: Compose) -> None:
    after = Backbone.load(str(trained / "checkpoints" / "iter_000002")).model
    fresh = composed("registers", "llama", "float32")
    fresh.setup(LearnedLatents(4, noise=0.5), torch.Generator())
    before = fresh.model.state_dict()
    same = {name for name, tensor in after.state_dict().items() if torch.equal(tensor, before[name])}
    frozen = {name for name in before if ".vision_tower." in name}
    assert frozen and frozen <= same
    moved = {name for name in before if ".multi_modal_projector." in name or ".language_model.layers." in name}
    assert moved and not moved & same


def test_an_export_is_a_stock_llava(trained: Path, pictures: list[Path], tmp_path: Path) -> None:
    """Stock transformers opens it, builds the sequence of the training, and says the same words."""
    assert run("export", [str(trained), str(tmp_path / "out")]) == 0
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(model) is LlavaForConditionalGeneration and processor.num_additional_image_tokens == 4
    student = HFStudent(str(trained / "checkpoints" / "iter_000002"))
    student.setup(LearnedLatents(4), torch.Generator())
    prompt = student.builder(PromptSettings(system="You look closely.")).prompt_of(
        Sample("a", (pictures[1],), "What colour is the shape?", "")
    )
    chat = [{"role": "user", "content": [{"type": "image", "path": str(pictures[1])}]}]
    chat[0]["content"].append({"type": "text", "text": "What colour is the shape?"})
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["input_ids"][0].tolist() == prompt.input_ids.tolist()
    assert processor.decode(prompt.input_ids).endswith("".join(latent_tokens(4)))
    words = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, len(prompt.input_ids) :]
    said = student.backbone.generate([prompt], 6)
    assert [processor.decode(words, skip_special_tokens=True).strip()] == said and said != [""]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_a_checkpoint_brings_back_every_bit(
    lora: LoraSettings | None, composed: Compose, samples: list[Sample], tmp_path: Path
) -> None:
    def student() -> ComposedStudent:
        made = composed("open_clip", dtype="float32", lora=lora)
        made.setup(LearnedLatents(2), torch.Generator().manual_seed(1))
        return made.eval()

    first = student()
    with torch.no_grad():
        for parameter in first.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    first.save(tmp_path)
    second = student()
    item = first.builder(SYSTEM).encode(samples[0], "blue")
    batch = collate([item], first.backbone.family, 0)
    wanted = first(batch)
    assert not torch.equal(second(batch), wanted)
    second.load(tmp_path)
    assert torch.equal(second(batch), wanted)


def test_adapters_are_exported_merged(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base is put together again, bit for bit: it is no folder that adapters apart could name."""
    words = ["--student.lora.rank", "2", "--train.steps", "1", "--work-dir", str(tmp_path / "run")]
    assert run("train", [str(recipe), *words]) == 0
    assert run("export", [str(tmp_path / "run"), str(tmp_path / "apart"), "--adapters", "apart"]) == 2
    assert "the base was composed for the run and is no folder" in capsys.readouterr().err
    assert run("export", [str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert type(Backbone.load(str(tmp_path / "out")).model) is LlavaForConditionalGeneration


def test_the_seed_is_of_what_starts_random(composed: Compose) -> None:
    one, same, other = (composed("class token", seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    differ = {name for name in one if not torch.equal(one[name], other[name])}
    assert any("multi_modal_projector" in name for name in differ) and any("vision_tower" in name for name in differ)
    assert not any("language_model.layers" in name for name in differ)


def test_a_tower_in_transformers_format(language: Callable[[str], Path], tmp_path: Path, samples: list[Sample]) -> None:
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=30, patch_size=8
    )
    own = SiglipVisionModel(config)
    own.save_pretrained(tmp_path)
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], resample=2).save_pretrained(tmp_path)
    student = ComposedStudent(str(tmp_path), str(language("qwen")), layer=1)
    images = student.backbone.processor.image_processor
    assert (images.image_mean, images.resample, images.size.height) == ((0.1, 0.2, 0.3), 2, 30)
    prompt = vision_of(student, samples[0])
    assert [span.tile.width for span in prompt.spans] == [3]  # the last 6 pixels are in no patch
    pixels = prompt.vision["pixel_values"]
    with torch.no_grad():
        wanted = student.model.model.multi_modal_projector(own(pixels, output_hidden_states=True).hidden_states[1])
        found = student.backbone.family.image_features(student.model, {"pixel_values": pixels})[0]
    torch.testing.assert_close(found, wanted[0])
    with pytest.raises(UserError, match=r"student\.image_size: .* has positions for 30 pixels, got 32"):
        ComposedStudent(str(tmp_path), str(language("qwen")), image_size=32)
    with pytest.raises(UserError, match=r"student\.tower: .* takes no weights or options"):
        ComposedStudent(str(tmp_path), str(language("qwen")), options={"depth": 1})


@pytest.mark.parametrize(
    ("tower", "given", "message"),
    [
        ("timm:vit_tinny_patch16_224", {}, "timm has no model 'vit_tinny_patch16_224'; near: .*vit_tiny_patch16_224"),
        ("timm:resnet10t", {}, r"'resnet10t' \(ResNet\) cannot become a tower of transformers"),
        ("timm:vit_tiny_patch16_224", {"image_size": 40}, r"image_size: got 40; .* takes multiples of its patch, 16"),
        ("timm:vit_tiny_patch16_224", {"layer": -5, "options": TINY}, r"layer: got -5; the tower has layers 1 to 3"),
        (
            "timm:vit_tiny_patch16_224",
            {"pretrained": True},
            "timm's vit_tiny_patch16_224 cannot be read from the hub: ",
        ),
        ("timm:vit_tiny_patch16_224", {"weights": "x.pt"}, r"student\.weights: got 'x\.pt'; a \.safetensors file"),
        ("timm:vit_tiny_patch16_224", {"attention": "sdpa"}, "attention: got 'sdpa'; allowed: laavit"),
        ("open_clip:ViT-B-99", {}, "open_clip has no model 'ViT-B-99'; near: ViT-B-"),
        ("open_clip:ViT-B-32", {"pretrained": True}, r"names no weights; write open_clip:ViT-B-32/WEIGHTS"),
        ("open_clip:ViT-B-32/laion", {"pretrained": True}, "open_clip has no weights 'laion' of ViT-B-32; near: "),
        ("nowhere", {}, "no vision tower can be read from 'nowhere': "),
    ],
)
def test_towers_that_cannot_be(
    tower: str, given: dict[str, Any], message: str, language: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message) as caught:
        ComposedStudent(tower, str(language("qwen")), **{"pretrained": False, **given})
    assert "\n" not in str(caught.value)


def test_language_models_that_cannot_be(language: Callable[[str], Path], tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            ComposedStudent("timm:vit_tiny_patch16_224", str(folder), 32, options=TINY, pretrained=False)

    refused(tmp_path / "nowhere", "no causal language model can be read from ")
    refused(
        language("gemma"), "a Gemma2ForCausalLM says something else as the language model of a LLaVA: it scales or caps"
    )  # it caps them
    refused(language("gemma, capped"), "a Gemma2ForCausalLM does not run laavit's attention: .* `softcap`")
    refused(language("gpt2"), "a GPT2LMHeadModel cannot be the language model of a LLaVA")
    refused(language("lfm2"), "layer 1 of a Lfm2ForCausalLM runs no attention that a gate or a target can reach")
    folder = write_language(tmp_path / "mute", "qwen")
    (folder / "chat_template.jinja").unlink()
    refused(folder, "its tokenizer has no chat template")
