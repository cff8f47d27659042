"""``laavit import lavit-official``: every tensor of the authors' layout lands, and the model says what theirs says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from official import SETTINGS, TOKENS, old_name, write_official
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from laavit.backbones import Backbone, PromptSettings
from laavit.cli import run
from laavit.evaluation.bridge import Laavit, Settings
from laavit.evaluation.gaze import Looker, look
from laavit.registry import UserError
from laavit.structures import Role, Sample

OURS = [f"<|latent_{i}|>" for i in range(1, 5)]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    return write_official(tiny_folder, tmp_path_factory.mktemp("official") / "LaViT-3B")


@pytest.fixture(scope="module")
def imported(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "lavit"
    assert run("import", ["lavit-official", str(official), str(out)]) == 0
    return out


@pytest.mark.parametrize(("old", "tied"), [(True, True), (False, True), (True, False)])
def test_every_tensor_lands(old: bool, tied: bool, tiny_folder: Path, tmp_path: Path) -> None:
    """Read off the files, by name: nothing is lost, nothing changed, and one row is new."""
    source = write_official(tiny_folder, tmp_path / "theirs", old, tied)
    assert run("import", ["lavit-official", str(source), str(tmp_path / "ours")]) == 0
    given = load_file(source / "model.safetensors")
    heads = {name: given.pop(name) for name in list(given) if name.split(".")[0] in ("v_top_head", "traj_head")}
    written = load_file(tmp_path / "ours" / "official_heads.safetensors")
    assert len(heads) == 6 and written.keys() == heads.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in heads.items())
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    found = dict(model.named_parameters())
    assert ("lm_head.weight" in found) == (not tied)
    assert {old_name(name) if old else name for name in found} == set(given)
    for name, tensor in found.items():
        theirs = given[old_name(name) if old else name]
        assert torch.equal(tensor[: len(theirs)], theirs), name
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert len(tensor) == len(theirs) + 1
            torch.testing.assert_close(tensor[-1], theirs.mean(0))
        else:
            assert tensor.shape == theirs.shape
    assert not set(SETTINGS) & set(json.loads((tmp_path / "ours/config.json").read_text()))


def inputs(folder: Path, text: str) -> Any:
    pixels = torch.randint(0, 256, (48, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "What colour is the shape?"}]
    chat = processor.tokenizer.apply_chat_template  # theirs writes no latents, ours does
    prompt = chat([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True,
                  chat_template=processor.chat_template)  # fmt: skip
    return processor(text=[prompt + text], images=[Image.fromarray(pixels.numpy())], return_tensors="pt")


@torch.no_grad()
def test_the_same_sequence_has_the_same_logits(official: Path, imported: Path) -> None:
    """Ids stay, so that rows do; the answer goes on from the last latent, without a separator."""
    theirs, ours = inputs(official, "".join(TOKENS) + " blue"), inputs(imported, " blue")
    assert torch.equal(theirs["input_ids"], ours["input_ids"])
    names = AutoProcessor.from_pretrained(imported).tokenizer.convert_ids_to_tokens(ours["input_ids"][0])
    assert [name for name in names if name.startswith("<|latent")] == OURS
    source = Qwen2_5_VLForConditionalGeneration.from_pretrained(official).eval()
    model = AutoModelForImageTextToText.from_pretrained(imported).eval()
    wanted, found = source(**theirs).logits, model(**ours).logits
    assert torch.equal(found[..., : wanted.shape[-1]], wanted)
    assert (source(**inputs(official, "".join(reversed(TOKENS)) + " blue")).logits - wanted).abs().max() > 1e-3


def test_the_bridge_runs_it_with_latents_and_without(official: Path, imported: Path) -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "yes or no?"}]}]
    on, off = Laavit(str(imported)), Laavit(str(imported), latents="off")
    [answer] = on.answer([chat], Settings(8, ()))
    source = Qwen2_5_VLForConditionalGeneration.from_pretrained(official).eval()
    prompt = AutoProcessor.from_pretrained(official).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    tokenizer = AutoProcessor.from_pretrained(official).tokenizer
    given = tokenizer(prompt + "".join(TOKENS), return_tensors="pt")
    ids = source.generate(**given, max_new_tokens=8, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert answer.text == tokenizer.decode(ids, skip_special_tokens=True).lstrip()
    masked = off.encode([chat])["attention_mask"]
    assert int((masked == 0).sum()) == 4 and bool((on.encode([chat])["attention_mask"] == 1).all())
    assert off.answer([chat], Settings(8, ()))
    with pytest.raises(UserError, match="says 2 latents"):  # four without a separator, or none
        Laavit(str(imported), latents="2").answer([chat], Settings(8, ()))


def test_emitted_leaves_the_latents_to_the_model(official: Path, tmp_path: Path) -> None:
    """As the authors evaluate it: the prompt ends with the assistant's header."""
    assert run("import", ["lavit-official", str(official), str(tmp_path / "out"), "--emitted"]) == 0
    model = Laavit(str(tmp_path / "out"))
    chat = [{"role": "user", "content": [{"type": "text", "text": "yes or no?"}]}]
    assert not torch.isin(model.encode([chat])["input_ids"], torch.tensor(model.latent_ids)).any()
    assert model.answer([chat], Settings(4, ()))
    assert Laavit(str(tmp_path / "out"), latents="off").answer([chat], Settings(4, ()))
    assert json.loads((tmp_path / "out/laavit.json").read_text())["layout"]["emitted"]


def test_laavits_own_sequences_read_it(imported: Path, samples: list[Sample]) -> None:
    """The builder takes the template's latents for its own four, and adds the separator; gaze finds their rows."""
    backbone = Backbone.load(str(imported))
    encoded = backbone.builder(PromptSettings(system=""), 4).encode(samples[0], "blue")
    assert int((encoded.roles == Role.LATENT).sum()) == 4
    names = backbone.tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    assert [name for name in names if name.startswith("<|latent")] == [*OURS, "<|latent_end|>"]
    [trace] = look(Looker.parse(f"x={imported}@latents"), samples[:1])
    assert trace.gaze.sum() > 0


def test_the_card_says_where_it_comes_from(official: Path, imported: Path) -> None:
    card = json.loads((imported / "laavit.json").read_text())
    assert (card["latents"], card["separator"], card["system"]) == (4, None, "")
    told = card["imported"]
    assert told["settings"] == SETTINGS and told["tokens"] == dict(zip(OURS, TOKENS)) and told["source"] == "LaViT-3B"
    assert told["files_sha256"].keys() == {"model.safetensors"}


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path) -> None:
    weights, whole = load_file(folder / "model.safetensors"), {}
    for part in (0, 1):
        names = sorted(weights)[part::2]
        file = f"model-0000{part + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
        whole |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": whole}))
    (folder / "model.safetensors").unlink()


def without_trajectory(folder: Path) -> None:
    change(folder, lambda w: [w.pop(name) for name in list(w) if name.startswith("traj_head")])


@pytest.mark.parametrize("form", [as_bin, as_shards, without_trajectory])
def test_other_forms_give_the_same_model(
    form: Callable[[Path], None], official: Path, imported: Path, tmp_path: Path
) -> None:
    shutil.copytree(official, tmp_path / "in")
    form(tmp_path / "in")
    assert run("import", ["lavit-official", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    wanted, found = (load_file(folder / "model.safetensors") for folder in (imported, tmp_path / "out"))
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    heads = load_file(tmp_path / "out" / "official_heads.safetensors")
    assert len(heads) == (4 if form is without_trajectory else 6)


def test_a_checkpoint_without_its_image_processor(
    official: Path, imported: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their first stage saves no processor: it comes from the base model, and dtype is a choice."""
    shutil.copytree(official, tmp_path / "in", ignore=shutil.ignore_patterns("*processor_config.json"))
    words = ["import", "lavit-official", str(tmp_path / "in"), str(tmp_path / "out")]
    assert run(words[0], words[1:]) == 2
    assert "give --processor FOLDER" in capsys.readouterr().err
    assert run(words[0], [*words[1:], "--processor", str(tiny_folder), "--dtype", "bfloat16"]) == 0
    weights, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", imported))
    for name, tensor in wanted.items():
        known = slice(-1 if name.endswith("embed_tokens.weight") else None)  # the separator's mean is taken in bf16
        assert torch.equal(weights[name][known], tensor.bfloat16()[known])
    one, two = (AutoProcessor.from_pretrained(folder) for folder in (tmp_path / "out", imported))
    assert one.tokenizer.get_vocab() == two.tokenizer.get_vocab() and one.chat_template == two.chat_template


# --- what is refused ----------------------------------------------------------------------------------------------


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    how(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit(name: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new))


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("executed",))


def evil(folder: Path) -> None:
    torch.save({"v_top_head.x": Evil()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lose_a_shard(folder: Path) -> None:
    as_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


NARROW = torch.zeros(32, 16)
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "another family": (edit("config.json", '"qwen2_5_vl"', '"qwen2_vl"'), "is of type 'qwen2_vl'; allowed: qwen2_5_vl"),
    "no tokens": (edit("tokenizer.json", "<lvr", "<xyz"), "has no <lvr> token; allowed: <lvr1>"),
    "other tokens": (edit("tokenizer.json", "<lvr3>", "<lvr7>"), "has <lvr1>, <lvr2>, <lvr4>, <lvr7>; allowed"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights; allowed: model.safetensors or"),
    "cut short": (lambda f: (f / "model.safetensors").write_bytes(b"\1" * 99), "cannot be read"),
    "a shard missing": (lose_a_shard, "model-00002-of-00002.safetensors is missing"),
    "code in a pickle": (evil, "holds more than tensors"),
    "no head": (lambda f: change(f, lambda w: w.pop("v_top_head.mlp.2.bias")), "has no tensor v_top_head.mlp.2.bias"),
    "another head": (lambda f: change(f, lambda w: w.update({"traj_head.x": NARROW})), "an unknown tensor traj_head.x"),
    "another width": (lambda f: change(f, lambda w: w.update({"v_top_head.mlp.0.weight": NARROW})),
                      r"\[32, 16\]; a model of width 32 needs \[32, 32\]"),
    "a weight missing": (lambda f: change(f, lambda w: w.pop("model.norm.weight")), "lacks weights: .*norm.weight"),
    "an unknown weight": (lambda f: change(f, lambda w: w.update({"lora.x": NARROW})), "has unknown weights: lora.x"),
    "too few rows": (
        lambda f: [edit("config.json", '"vocab_size": 334', '"vocab_size": 331')(f),
                   change(f, lambda w: w.update({"model.embed_tokens.weight": torch.zeros(331, 32)}))],
        "<lvr4> is token 333, and the embedding has 331 rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_odd_checkpoints_are_refused(
    case: str, official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = REFUSED[case]
    folder = tmp_path / "in"
    shutil.copytree(official, folder)
    spoil(folder)
    assert run("import", ["lavit-official", str(folder), str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), said.err
    assert "executed" not in said.out and not (tmp_path / "out").exists()


def test_words_that_are_refused(
    official: Path, imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    for words, message in (
        (["lavit-officail", str(official), str(tmp_path / "o")], "did you mean 'lavit-official'"),
        (["lavit-official", str(tmp_path / "nowhere"), str(tmp_path / "o")], "config.json is missing"),
        (["lavit-official", str(official), str(tmp_path / "full")], "exists and is no export of laavit"),
        (["lavit-official", str(official), str(tmp_path / "o"), "--dtype", "float8"], "no dtype is called 'float8'"),
        (["lavit-official", str(imported), str(tmp_path / "o")], "has no <lvr> token"),
    ):
        assert run("import", words) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "full/x").read_text() == "mine"
