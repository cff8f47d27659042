"""Answers of who does not see the image: the teacher itself, or a language model without eyes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from laavit.registry import UserError
from laavit.structures import Sample
from laavit.teachers import ExtractSettings, HFTeacher

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def teacher(tiny_folder: Path) -> HFTeacher:
    return HFTeacher(str(tiny_folder))


def language_model(folder: Path, chat: bool) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT if chat else None
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.4,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answers(teacher: HFTeacher, samples: list[Sample], blind: str | None) -> list[str | None]:
    extractor = teacher.extractor(ExtractSettings(answer="gold", max_new_tokens=4, blind=blind))
    return [trace.blind_answer for trace in extractor([extractor.preparer(sample) for sample in samples])]


def test_nobody_is_asked_by_default(teacher: HFTeacher, samples: list[Sample]) -> None:
    assert answers(teacher, samples, None) == [None] * 3


def test_the_teacher_without_the_image(teacher: HFTeacher, samples: list[Sample], pictures: list[Path]) -> None:
    found = answers(teacher, samples, "teacher")
    builder = teacher.extractor(ExtractSettings()).preparer.builder
    for sample, answer in zip(samples, found, strict=True):
        prompt = builder.prompt_of(replace(sample, images=()))
        assert not prompt.spans and not prompt.vision
        assert teacher.backbone.generate([prompt], 4) == [answer]
    other = [replace(sample, images=(pictures[1],)) for sample in samples]
    assert answers(teacher, other, "teacher") == found


@pytest.mark.parametrize("chat", [True, False])
def test_a_language_model_by_name(teacher: HFTeacher, samples: list[Sample], tmp_path: Path, chat: bool) -> None:
    folder = language_model(tmp_path, chat)
    found = answers(teacher, samples, str(folder))
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), tiny_tokenizer()
    for sample, answer in zip(samples, found, strict=True):
        written = f"<|im_start|>user\n{sample.question}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer.encode(written if chat else f"Question: {sample.question}\nAnswer:", add_special_tokens=False)
        new: list[int] = []
        for _ in range(4):
            with torch.no_grad():
                token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
        expected = tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answer == (expected if chat else expected.partition("\n")[0].strip())


def test_no_such_language_model(teacher: HFTeacher, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"extract\.blind: no text-only language model can be read from"):
        teacher.extractor(ExtractSettings(blind=str(tmp_path / "none")))
