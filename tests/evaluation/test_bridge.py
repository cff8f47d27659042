"""The model class: batches, caches, latents on and off, prompts and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_eval.api.instance import Instance
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from laavit.evaluation.bridge import Laavit, Settings
from laavit.evaluation.interventions import MaskLatents
from laavit.registry import UserError

LONG = Settings(max_new_tokens=12, until=())


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def chat(question: str, *images: Image.Image) -> list[dict]:
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


CHATS = [
    chat("how many ?", picture(0)),
    chat("what colour is left of the red circle ?", picture(1, (64, 64))),
    chat("is one left of two ?", picture(2), picture(3, (32, 48))),
    chat("yes or no ?"),
    chat("how many circle ?", picture(4)),
]


@pytest.fixture(scope="module", params=["on", "off"])
def model(request: pytest.FixtureRequest, export: Path) -> Laavit:
    return Laavit(str(export), latents=request.param)


@pytest.fixture
def masked(export: Path) -> Laavit:
    return Laavit(str(export), latents="off")


def texts(model: Laavit, chats: list[Any], settings: Settings = LONG) -> list[str]:
    return [answer.text for answer in model.answer(chats, settings)]


def test_batched_answers_are_the_single_ones(model: Laavit) -> None:
    """Left padding, unequal and several images, and a question without one."""
    single = [texts(model, [one])[0] for one in CHATS]
    assert texts(model, CHATS) == single
    assert len(set(single)) > 2  # a model that always says the same would prove nothing


def test_stock_transformers_gives_the_same_tokens(export: Path) -> None:
    """The export by itself, as a user without laavit runs it: latents come from its chat template."""
    ours = Laavit(str(export), system="")
    processor = AutoProcessor.from_pretrained(export)
    stock = AutoModelForImageTextToText.from_pretrained(export).eval()
    for one, text in zip(CHATS, texts(ours, CHATS)):
        inputs = processor.apply_chat_template(
            one, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = stock.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(output, skip_special_tokens=True) == text


def test_prompts_of_another_kind_than_the_training_s_are_warned_of(
    export: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A task orders and words its own prompts: a model that learned others is not evaluated as it was trained."""
    Laavit(str(export))
    assert not [record for record in caplog.records if "trained with" in record.message]
    other = shutil.copytree(export, tmp_path / "other")
    card = json.loads((other / "laavit.json").read_text())
    (other / "laavit.json").write_text(json.dumps(card | {"order": "question_first", "suffix": " In one word."}))
    Laavit(str(other))
    said = " ".join(record.message for record in caplog.records)
    assert "prompt.order 'question_first'" in said and "prompt.suffix ' In one word.'" in said


def test_adapters_alone_are_refused(tmp_path: Path) -> None:
    """peft's folder names a base; evaluating what transformers makes of it would be evaluating something else."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds adapters alone; export the run again without --adapters apart"):
        Laavit(str(tmp_path))


def blocked(inputs: dict[str, torch.Tensor], latents: list[int]) -> torch.Tensor:
    """The additive 4-D mask [B, 1, S, S]: causal, no padding keys, and for every query no latent keys."""
    tokens = inputs["input_ids"]
    seen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    keys = (inputs["attention_mask"] == 1) & ~torch.isin(tokens, torch.tensor(latents))
    allowed = seen[None] & keys[:, None]
    allowed |= torch.eye(tokens.shape[1], dtype=torch.bool)  # a padded query needs something to look at
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]


def reference(model: Laavit, chats: list[Any], latents: list[int], steps: int) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens without any cache, each step one full forward with the 4-D mask and the unmasked positions.

    Returns the tokens [B][steps] and the first step's logits [B, V].
    """
    inputs = model.encode(chats)
    inputs["attention_mask"] = (inputs["attention_mask"] == 1).long()
    inputs["attention_mask"] |= torch.isin(inputs["input_ids"], torch.tensor(model.latent_ids)).long()
    inputs.pop("position_ids", None)
    hf = model.model
    grid = {"image_grid_thw": inputs["image_grid_thw"], "mm_token_type_ids": inputs["mm_token_type_ids"]}
    positions, _ = hf.model.get_rope_index(inputs["input_ids"], attention_mask=inputs["attention_mask"], **grid)
    start, first = inputs["input_ids"].shape[1], None
    for _ in range(steps):
        logits = hf(
            input_ids=inputs["input_ids"],
            attention_mask=blocked(inputs, latents),
            position_ids=positions,
            pixel_values=inputs["pixel_values"],
            **grid,
        ).logits[:, -1]
        first = logits if first is None else first
        chosen = logits.argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], chosen], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(chosen)], 1)
        grid["mm_token_type_ids"] = torch.cat([grid["mm_token_type_ids"], torch.zeros_like(chosen)], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
    assert first is not None
    return inputs["input_ids"][:, start:].tolist(), first


@torch.inference_mode()
def test_cached_generation_is_the_full_forward(model: Laavit) -> None:
    """Generation with a KV cache = without one; masked latents = a 4-D mask that blocks exactly the latents' keys."""
    chats = [CHATS[0], CHATS[1], CHATS[2], CHATS[4]]
    hidden = model.latent_ids if model.latents == "off" else []
    tokens, first = reference(model, chats, hidden, steps=8)
    inputs = model.encode(chats)
    output = model.model.generate(
        **inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    torch.testing.assert_close(output.logits[0], first, atol=2e-5, rtol=1e-5)
    generated = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    stop = model.tokenizer.eos_token_id
    for ours, theirs in zip(generated, tokens):
        length = theirs.index(stop) if stop in theirs else len(theirs)
        assert ours[:length] == theirs[:length]


def first_logits(model: Laavit) -> torch.Tensor:
    with torch.inference_mode():
        inputs = model.encode(CHATS[:3])
        return model.model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        ).logits[0]


def test_the_latents_matter_exactly_when_they_are_on(model: Laavit) -> None:
    """Other embeddings of the latents: not one bit of the answer moves when they are off; it moves when they are on."""
    embeddings = model.model.get_input_embeddings().weight
    before, kept = first_logits(model), embeddings.detach().clone()
    try:
        with torch.no_grad():
            embeddings[model.latent_ids] += 1.0
        after = first_logits(model)
    finally:
        with torch.no_grad():
            embeddings.copy_(kept)
    words = [i for i in range(before.shape[1]) if i not in model.latent_ids]  # a tied output layer moves their columns
    same = torch.equal(before[:, words], after[:, words])
    assert same == (model.latents == "off")


def test_masking_moves_no_position(masked: Laavit, export: Path) -> None:
    """Positions are the unmasked prompt's; counted along the mask they would differ, and so would the logits."""
    inputs = masked.encode(CHATS[:3])
    plain = Laavit(str(export)).encode(CHATS[:3])
    positions = masked.model._prepare_position_ids_for_generation(plain["input_ids"], plain)
    assert torch.equal(inputs["position_ids"], positions)
    cut = plain["attention_mask"] - inputs["attention_mask"]
    assert torch.equal(cut == 1, torch.isin(plain["input_ids"], torch.tensor(masked.latent_ids)))
    naive = {name: value for name, value in inputs.items() if name != "position_ids"}
    with torch.inference_mode():
        moved = masked.model.generate(
            **naive, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        ).logits[0]
    assert (moved - first_logits(masked)).abs().max() > 1e-3


def test_a_prompt_without_latents_cannot_be_masked(stock: Path, masked: Laavit) -> None:
    with pytest.raises(UserError, match="knows no"):
        Laavit(str(stock), latents="off")
    inputs = Laavit(str(stock)).encode(CHATS[:1])
    with pytest.raises(UserError, match="writes no latent tokens"):
        MaskLatents()(masked.model, inputs, masked.latent_ids)


def test_a_template_that_lost_its_latents_is_noticed(export: Path, tmp_path: Path) -> None:
    """Latents that are silently off were the neighbours' most reported fault."""
    folder = tmp_path / "lost"
    shutil.copytree(export, folder)
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|latent_2|>", ""))
    with pytest.raises(UserError, match="says 4 latents"):
        Laavit(str(folder)).answer(CHATS[:1], LONG)


def prompt(model: Laavit) -> str:
    return model.tokenizer.decode(model.encode(CHATS[:1])["input_ids"][0])


def test_system_prompt(export: Path, stock: Path, tmp_path: Path) -> None:
    """The export's own by default, the given one, a file's, or none."""
    assert "look first" in prompt(Laavit(str(export)))
    assert "look" not in prompt(Laavit(str(export), system="yes no"))
    assert "yes no" in prompt(Laavit(str(export), system="yes no"))
    file = tmp_path / "system.txt"
    file.write_text("two circle\n")
    assert "two circle" in prompt(Laavit(str(export), system=str(file)))
    assert "system" not in prompt(Laavit(str(export), system=""))
    assert "system" not in prompt(Laavit(str(stock)))


class Documents:
    """A task's split for requests: document i is chat i."""

    def __getitem__(self, index: int) -> int:
        return index


def request(index: int, context: str, settings: dict[str, Any]) -> Instance:
    def messages(document: int) -> list[dict]:
        return [
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": part["image"]} if part["type"] == "image" else part
                    for part in CHATS[document][0]["content"]
                ],
            }
        ]

    return Instance(
        request_type="generate_until",
        arguments=(context, messages, settings, index, "task", "test"),
        idx=0,
        metadata={"task": "task", "doc_id": index, "repeats": 1},
    )


def test_answers_come_in_the_order_of_the_requests(export: Path) -> None:
    """Whatever was sorted, grouped by settings and batched on the way."""
    model = Laavit(str(export), batch_size=2)
    model.task_dict = {"task": {"test": Documents()}}
    settings = [{"max_new_tokens": 12}, {"max_new_tokens": 2}]
    contexts = [str(one[0]["content"][-1]["text"]) for one in CHATS]
    requests = [request(i, contexts[i], settings[i % 2]) for i in range(len(CHATS))]
    answers = model.generate_until(requests)
    lengths = [12, 2, 12, 2, 12]
    assert [a.text for a in answers] == [texts(model, [c], Settings(n, ()))[0] for c, n in zip(CHATS, lengths)]
    assert all(a.token_counts.output_tokens <= n for a, n in zip(answers, lengths))
    assert set(model.seconds) == {("task", i) for i in range(len(CHATS))}


def test_until_cuts_and_a_limit_limits(export: Path) -> None:
    model = Laavit(str(export))
    [full] = texts(model, CHATS[:1])
    words = full.split()
    assert len(words) > 2
    stop = f" {words[2]}"
    assert texts(model, CHATS[:1], Settings(12, ("never", stop))) == [full[: full.index(stop)]]
    assert len(texts(model, CHATS[:1], Settings(2, ()))[0].split()) <= 2
    assert model._settings({"until": "x", "max_new_tokens": 3}) == Settings(3, ("x",))
    assert model._settings({"until": None}) == Settings(128, ())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": "of"}, "latents=of was given; allowed: off, on"),
        ({"dtype": "int8"}, "dtype=int8"),
        ({"batch_size": "auto"}, "batch_size=auto"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_wrong_arguments_are_named(export: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Laavit(str(export), **arguments)


def test_no_model_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model could be loaded from"):
        Laavit(str(tmp_path))


def test_dtype_is_a_choice(export: Path) -> None:
    model = Laavit(str(export), dtype="bfloat16")
    assert model.model.dtype == torch.bfloat16
    assert len(texts(model, CHATS)) == len(CHATS)


def test_broken_export_file(export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(export, folder)
    (folder / "laavit.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Laavit(str(folder))
    (folder / "laavit.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="holds a list"):
        Laavit(str(folder))
