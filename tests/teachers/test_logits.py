"""What is recorded along the gold answer, against the teacher's own forward over prompt and answer, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from families import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from laavit.cli import run
from laavit.registry import UserError
from laavit.structures import Sample, Trace
from laavit.teachers import ExtractSettings, HFTeacher
from laavit.traces import shards
from laavit.traces.checking import problems
from laavit.traces.schema import trace_features
from laavit.traces.store import TraceStore

#: one grid an image, tiles; layers with a sliding window take their time (``make slow``)
FAMILIES = ("qwen2_5_vl", "internvl", pytest.param("gemma3", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], HFTeacher]:
    made: dict[str, HFTeacher] = {}

    def open_teacher(name: str) -> HFTeacher:
        if name not in made:
            made[name] = HFTeacher(str(tiny(name, tmp_path_factory.mktemp(name))), dtype="float64")
        return made[name]

    return open_teacher


@pytest.fixture(scope="module")
def asked(samples: list[Sample]) -> list[Sample]:
    """Samples of several sizes whose gold answers are shorter and longer than what the teacher says."""
    long = replace(samples[1], answer="the blue shape, left of the red circle, and no other one: yes")
    return [samples[0], long, replace(samples[2], answer="")]


def traces(teacher: HFTeacher, samples: Sequence[Sample], **changes: Any) -> list[Trace]:
    extractor = teacher.extractor(ExtractSettings(**{"max_new_tokens": 5} | changes))
    return extractor([extractor.preparer(sample) for sample in samples])


def expected(teacher: HFTeacher, sample: Sample, **changes: Any) -> tuple[Tensor, Tensor]:
    """The answer's tokens [M] and log-softmax [M, V], from one whole forward over one sample."""
    backbone = teacher.backbone
    item = teacher.extractor(ExtractSettings(**changes)).preparer.builder.encode(sample, sample.answer)
    vision = backbone.family.batch([item.vision])
    positions = {} if item.position_ids is None else {"position_ids": item.position_ids[..., None, :]}
    inputs = backbone.family.inputs(vision, None) | backbone.family.text_inputs(item.input_ids[None])
    with torch.no_grad():
        logits = backbone.model(input_ids=item.input_ids[None], use_cache=False, **positions, **inputs).logits[0]
    first = int((item.labels >= 0).float().argmax()) + 1
    return item.input_ids[first:], logits[first - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {"answer": "gold"},
        {"answer": "teacher"},
        pytest.param({"answer": "teacher", "rows": ("question",), "max_new_tokens": 1}, marks=pytest.mark.slow),
        {"answer": "teacher", "prompt_order": "question_first", "steps": "word", "system": "You look."},
    ],
    ids=["gold", "teacher", "without_its_words", "settings"],
)
def test_logits_are_the_teachers_along_the_gold_answer(
    teachers: Any, asked: list[Sample], family: str, changes: dict[str, Any]
) -> None:
    teacher = teachers(family)
    vocabulary = teacher.backbone.model.config.get_text_config().vocab_size
    prompt = {key: value for key, value in changes.items() if key in ("prompt_order", "system")}
    whole, part, none = (traces(teacher, asked, logits=k, **changes) for k in (vocabulary, 3, 0))
    for sample, all_of_it, some, without in zip(asked, whole, part, none, strict=True):
        tokens, logprobs = expected(teacher, sample, **prompt)
        assert all_of_it.logits is not None and some.logits is not None and without.logits is None
        assert torch.equal(all_of_it.logits.tokens, tokens) and torch.equal(some.logits.tokens, tokens)
        found = torch.empty_like(logprobs).scatter(1, all_of_it.logits.ids, all_of_it.logits.logprobs.double())
        torch.testing.assert_close(found, logprobs, rtol=2e-7, atol=1e-9)
        best = logprobs.sort(-1, descending=True)
        assert torch.equal(some.logits.ids, best.indices[:, :3])
        torch.testing.assert_close(some.logits.logprobs.double(), best.values[:, :3], rtol=2e-7, atol=1e-9)
        assert some.logits.logprobs.dtype == torch.float32
        # whoever answers, and whatever is kept beside it: the rest of the trace is what it was
        assert some.answer == without.answer and some.mass == without.mass
        assert torch.equal(some.gaze, without.gaze) and torch.equal(some.semantics, without.semantics)


@contextmanager
def counting(teacher: HFTeacher) -> Iterator[list[int]]:
    """The number of tokens a sample of every pass of the decoder."""
    widths: list[int] = []

    def note(module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        given = named.get("inputs_embeds")
        widths.append((given if given is not None else named["input_ids"]).shape[1])

    decoder = teacher.backbone.family.decoder(teacher.backbone.model)
    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    yield widths
    handle.remove()


def test_the_prompt_is_read_once(teachers: Any, asked: list[Sample]) -> None:
    teacher = teachers("qwen2_5_vl")
    builder = teacher.extractor(ExtractSettings()).preparer.builder
    prompts = [builder.prompt_of(sample) for sample in asked]
    gold = max(len(builder.with_answer(p, p.sample.answer).input_ids) - len(p.input_ids) for p in prompts)
    longest = max(len(p.input_ids) for p in prompts)
    with counting(teacher) as plain:
        traces(teacher, asked, answer="teacher")
    with counting(teacher) as widths:
        traces(teacher, asked, answer="teacher", logits=2)
    assert widths[0] == longest and widths == [*plain, gold] and gold < longest
    with counting(teacher) as widths:
        traces(teacher, asked, answer="gold", logits=2)
    assert len(widths) == 1


def test_logits_that_are_not_finite_put_a_sample_aside(own_project: Path, write_tiny: Callable[..., Path]) -> None:
    folder = write_tiny(own_project.parent / "broken")
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("embed_tokens.weight"))
    weights[name][-1] = torch.inf  # a token that no prompt holds; the head is tied
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    flags = [str(own_project), "--teacher.path", str(folder), "--filters", "null"]
    assert run("extract", flags) == 0  # nobody asks for that token
    other = ["--extract.logits", "2", "--traces.path", str(own_project.parent / "other")]
    assert run("extract", [*flags, *other]) == 2  # of the first shard none is left


# --- settings and stores ----------------------------------------------------------------------------------------------


def test_settings_that_cannot_be_met_are_refused(teachers: Any) -> None:
    with pytest.raises(UserError, match=r"extract.logits: at least 0, got -1"):
        ExtractSettings(logits=-1)
    with pytest.raises(UserError, match=r"extract.logits: the gold answer is read on the prompt's cached keys"):
        ExtractSettings(logits=4, passes=2)
    assert ExtractSettings(logits=4, passes=2, answer="gold").logits == 4  # one pass reads it all
    with pytest.raises(UserError, match=r"extract.logits: got 100000, and the teacher's vocabulary has \d+ tokens"):
        teachers("qwen2_5_vl").extractor(ExtractSettings(logits=100_000))
    assert "logits" not in ExtractSettings().card() and ExtractSettings(logits=4).card()["logits"] == 4


def extracted(recipe: Path, name: str, *flags: str) -> Path:
    """A store ``name`` beside the recipe."""
    folder = recipe.parent / name
    assert run("extract", [str(recipe), "--traces.path", str(folder), "--filters", "null", *flags]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_without_logits_a_store_is_what_it_was(own_project: Path) -> None:
    """Header and columns; only what was asked for comes beside them."""
    plain, kept = extracted(own_project, "plain"), extracted(own_project, "kept", "--extract.logits", "3")
    header, other = (shards.read_header(folder) for folder in (plain, kept))
    assert header is not None and other is not None
    assert shards.differences(header.content, other.content, subset=False) == [
        "'settings.logits' is missing in the store and 3 here",
        f"'tokenizer_sha256' is missing in the store and {other.content['tokenizer_sha256']!r} here",
    ]
    names = [file.name for file in sorted(plain.glob("shard-*.arrow"))]
    assert names
    for name in names:
        for one, two in zip(shards.read_rows(plain / name), shards.read_rows(kept / name), strict=True):
            new = {"answer_tokens", "logit_ids", "logprobs"}
            assert two.keys() - one.keys() == new and one.keys() <= two.keys()
            old = trace_features("float32")  # but for the new columns, the rows are the same
            assert shards.stream_bytes([one], old) == shards.stream_bytes([two], old)
    assert not problems(kept) and not problems(plain)


def test_parts_and_a_second_run_give_the_same_bytes(own_project: Path) -> None:
    flags = ("--extract.logits", "5", "--extract.answer", "teacher", "--extract.max_new_tokens", "3")
    whole = extracted(own_project, "whole", *flags)
    first = extracted(own_project, "parts", *flags, "--part", "1/2")
    assert contents(first) != contents(whole)
    assert contents(extracted(own_project, "parts", *flags)) == contents(whole)  # goes on
    one, two = (extracted(own_project, f"part{n}", *flags, "--part", f"{n}/2") for n in (1, 2))
    assert run("traces", ["merge", str(own_project.parent / "merged"), str(one), str(two)]) == 0
    assert contents(own_project.parent / "merged") == contents(whole)
    assert all(trace.logits is not None for trace in TraceStore(whole))


def test_a_store_goes_on_with_its_own_setting_alone(own_project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = extracted(own_project, "store", "--extract.logits", "5")
    for given in ("0", "4"):
        flags = [str(own_project), "--traces.path", str(folder), "--filters", "null", "--extract.logits", given]
        assert run("extract", flags) == 2
        assert "'settings.logits' is 5 in the store" in capsys.readouterr().err


def test_the_tools_over_stores_know_the_column(own_project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = extracted(own_project, "store", "--extract.logits", "4")
    other = extracted(own_project, "other", "--extract.logits", "4", "--extract.system", "You look.")
    none = extracted(own_project, "none")
    out = own_project.parent / "out"
    out.mkdir()
    ids = TraceStore(store).ids
    capsys.readouterr()
    assert run("traces", ["stats", str(store)]) == 0
    assert "answer tokens with logits" in (text := capsys.readouterr().out) and "outside of the kept logits" in text
    assert run("traces", ["show", str(store), ids[0]]) == 0
    assert "answer tokens with logits" in capsys.readouterr().out
    assert run("traces", ["verify", str(store)]) == 0
    assert run("traces", ["card", str(store)]) == 0 and "| logit_ids, logprobs |" in (store / "README.md").read_text()
    assert run("traces", ["card", str(none)]) == 0 and "logprobs" not in (none / "README.md").read_text()
    assert run("traces", ["diff", str(store), str(other)]) == 1
    assert f"other answer logits: {len(ids)}" in capsys.readouterr().out

    assert run("traces", ["export", str(store), str(out / "part"), "--limit", "2"]) == 0
    part = TraceStore(out / "part")
    for one in part:
        two = TraceStore(store).get(one.sample_id)
        assert one.logits is not None and two.logits is not None
        for a, b in zip(vars(one.logits).values(), vars(two.logits).values(), strict=True):
            assert torch.equal(a, b)
    for kind in ("parquet", "jsonl"):
        assert run("traces", ["export", str(store), str(out / f"rows.{kind}"), "--format", kind]) == 0
    lines = [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert pq.read_table(out / "rows.parquet").column("logits").to_pylist() == [line["logits"] for line in lines]
    first = TraceStore(store)[0].logits
    assert first is not None and lines[0]["logits"]["ids"] == first.ids.tolist()
    assert run("traces", ["export", str(none), str(out / "none.parquet"), "--format", "parquet"]) == 0
    assert "logits" not in pq.read_table(out / "none.parquet").column_names
