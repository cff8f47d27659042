"""The judge's figure is the softmax of two words' logits, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from laavit.registry import UserError
from laavit.traces.filters import CorrectnessFilter
from laavit.traces.judges import LMJudge, Question

ASKED = [
    Question("What colour?", "blue", "navy"),
    Question("Where?", "left", "it stands at the left-hand side of the other one"),
    Question("?", "x", "y"),
    Question("How many shapes are there?", "three", "a few"),
]
PLAIN = "{question} {target} {answer} {yes} {no}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer, no chat template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["yes no Yes No yes no"], trainer)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("judge")
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(path)
    return path


def naive(folder: Path, question: Question, template: str) -> float:
    """One prompt at a time, all logits, float64."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    text = template.format(**question._asdict(), yes="yes", no="no")
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode(text)])).logits[0, -1]
    total = {}
    for word in ("yes", "no"):
        ids = {tokenizer.encode(form)[0] for form in (word, word.capitalize(), f" {word}", f" {word.capitalize()}")}
        ids = {i for i in ids if tokenizer.decode([i]).strip()}
        total[word] = logits.exp()[sorted(ids)].sum()
    return float(total["yes"] / (total["yes"] + total["no"]))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_figures_equal_one_prompt_at_a_time(folder: Path, batch_size: int) -> None:
    found = LMJudge(str(folder), prompt=PLAIN, batch_size=batch_size, dtype="float64")(ASKED)
    for question, (verdict, figure) in zip(ASKED, found, strict=True):
        assert figure == pytest.approx(naive(folder, question, PLAIN), abs=1e-10)
        assert verdict == (figure >= 0.5)
    assert len({round(figure, 6) for _, figure in found}) == len(ASKED)  # it depends on the prompt


def test_a_chat_template_is_used(folder: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    found = LMJudge(str(tmp_path), prompt=PLAIN, dtype="float64")(ASKED)
    assert [f for _, f in found] == pytest.approx([naive(folder, q, f"<{PLAIN}>") for q in ASKED], abs=1e-10)


def test_as_a_filter_s_part_from_the_registry(folder: Path) -> None:
    judge = CorrectnessFilter(judge={"name": "lm", "path": str(folder), "batch_size": 2}).judge
    assert isinstance(judge, LMJudge) and judge.batch_size == 2
    assert judge([]) == []


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded as a causal"):
        LMJudge(str(tmp_path / "none"))(ASKED)
    with pytest.raises(UserError, match="told apart by no first token"):
        LMJudge(str(folder), no="yes")(ASKED)
    with pytest.raises(UserError, match="allowed fields"):
        LMJudge("x", prompt="{colour}")
    with pytest.raises(UserError, match="minimum"):
        LMJudge("x", minimum=2)
    with pytest.raises(UserError, match="batch_size"):
        LMJudge("x", batch_size=0)
