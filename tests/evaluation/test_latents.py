"""Latents at evaluation: another number in the prompt, or written by the model: counted, stripped, paid for apart."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from laavit.evaluation.bridge import Laavit, Settings
from laavit.evaluation.gaze import Looker, look
from laavit.evaluation.records import read_records
from laavit.evaluation.run import evaluate
from laavit.latents import latent_tokens
from laavit.registry import UserError
from laavit.structures import Sample

WRITTEN = "".join(latent_tokens(4))


def with_layout(export: Path, folder: Path, template: int = 4, **layout: Any) -> Path:
    """A copy of an export of four latents with another layout, its template writing ``template`` of them."""
    shutil.copytree(export, folder)
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace(WRITTEN, "".join(latent_tokens(template))))
    card = json.loads((folder / "laavit.json").read_text())
    (folder / "laavit.json").write_text(json.dumps(card | {"layout": {"most": 4, **layout}}))
    return folder


@pytest.fixture(scope="module")
def emitting(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_layout(export, tmp_path_factory.mktemp("own") / "emitting", 0, emitted=True)


@pytest.fixture(scope="module")
def varying(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_layout(export, tmp_path_factory.mktemp("own") / "varying", least=2)


def chat(question: str) -> list[dict[str, Any]]:
    picture = Image.new("RGB", (48, 32), "red")
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]


CHATS = [chat("how many ?"), chat("what colour is left of the red circle ?"), chat("yes or no ?")]


def scripted(model: Laavit, monkeypatch: pytest.MonkeyPatch, says: list[str]) -> dict[str, Any]:
    """The model says these texts, whatever it is asked; returns what ``generate`` was given."""
    given: dict[str, Any] = {}

    def generate(input_ids: Tensor, **arguments: Any) -> Tensor:
        given.update(arguments)
        ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in says]
        longest = max(map(len, ids))
        words = torch.tensor([own + [model.tokenizer.pad_token_id] * (longest - len(own)) for own in ids])
        return torch.cat([input_ids, words], 1)

    monkeypatch.setattr(model.model, "generate", generate)
    return given


def test_written_latents_are_counted_and_cost_the_answer_nothing(
    emitting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Laavit(str(emitting))
    says = [
        f"{WRITTEN} red blue green red blue",
        "red blue green red blue green",
        "<|latent_1|><|latent_end|> yes<|im_end|>",
    ]
    given = scripted(model, monkeypatch, says)
    found = model.answer_and_count(CHATS, Settings(4, ()))
    assert given["max_new_tokens"] == 4 + 5 and "suppress_tokens" not in given
    assert [answer.text for answer, _ in found] == ["red blue green red", "red blue green red", "yes"]
    assert [count for _, count in found] == [4, 0, 1]
    assert [answer.token_counts.output_tokens for answer, _ in found] == [9, 4, 3]
    assert [answer.text for answer in model.answer(CHATS, Settings(2, ("blue",)))] == ["red ", "red ", "yes"]


def test_forced_latents_leave_the_budget_alone(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Laavit(str(export))
    given = scripted(model, monkeypatch, ["red blue", "red", "yes"])
    assert [count for _, count in model.answer_and_count(CHATS, Settings(4, ()))] == [0, 0, 0]
    assert given["max_new_tokens"] == 4


def louder(model: Laavit) -> None:
    """Latents are said wherever the model would say one of some words: their scores are half as high again."""
    ids = model.tokenizer.convert_tokens_to_ids(latent_tokens(4))
    words = model.tokenizer.convert_tokens_to_ids(["red", "blue", "green", "circle", "square"])
    with torch.no_grad():
        model.model.lm_head.weight[ids] = 1.5 * model.model.lm_head.weight[words]


def test_off_forbids_what_the_model_would_write(emitting: Path) -> None:
    on, off = Laavit(str(emitting)), Laavit(str(emitting), latents="off")
    plain = [answer.text for answer in off.answer(CHATS, Settings(8, ()))]
    louder(on)
    louder(off)
    assert sum(count for _, count in on.answer_and_count(CHATS, Settings(8, ()))) > 0
    found = off.answer_and_count(CHATS, Settings(8, ()))
    assert [answer.text for answer, _ in found] == plain and [count for _, count in found] == [0, 0, 0]


def test_a_template_that_writes_what_the_model_is_to_write_is_noticed(export: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="says 0 latents, but the prompts"):
        Laavit(str(with_layout(export, tmp_path / "both", 4, emitted=True))).answer(CHATS, Settings(2, ()))


def test_another_number_in_the_prompt(export: Path, varying: Path, tmp_path: Path) -> None:
    """N latents are what an export whose template writes N would have; the template's number is the most."""
    assert Laavit(str(varying)).answer(CHATS, Settings(6, ())) == Laavit(str(export)).answer(CHATS, Settings(6, ()))
    for number in (2, "3"):
        model = Laavit(str(varying), latents=number)
        written = model.tokenizer.convert_tokens_to_ids(latent_tokens(int(number)))
        for prompt in model.encode(CHATS)["input_ids"].tolist():
            assert prompt[-len(written) :] == written and written[0] not in prompt[: -len(written)]
        own = with_layout(export, tmp_path / str(number), int(number), most=int(number))
        assert model.answer(CHATS, Settings(6, ())) == Laavit(str(own)).answer(CHATS, Settings(6, ()))


def test_fewer_than_ever_trained_is_warned_of(varying: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Laavit(str(varying), latents=2)
        assert "never trained" not in caplog.text
        Laavit(str(varying), latents=1)
    assert "never trained with so few" in caplog.text


@pytest.mark.parametrize(
    ("folder", "latents", "message"),
    [
        ("varying", 5, "has 4: allowed are on, off, 1 to that"),
        ("varying", 0, "latents=0 was given"),
        ("varying", "2.5", "latents=2.5 was given; allowed: off, on, or how many"),
        ("emitting", 2, "writes its latents itself; allowed: on, off"),
        ("stock", 2, "has none; allowed: on, off"),
    ],
)
def test_numbers_that_cannot_be(folder: str, latents: Any, message: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(UserError, match=message):
        Laavit(str(request.getfixturevalue(folder)), latents=latents)


def test_records_and_summary_say_how_many_were_written(
    emitting: Path, microlab_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """This model writes none: that is said, per question, in the summary and in a warning."""
    with caplog.at_level(logging.WARNING):
        summary = evaluate(emitting, ["microlab_test"], tmp_path, batch_size=3, data_root=microlab_data, limit=3)
    assert summary is not None
    assert summary["tasks"]["microlab_test"]["latents_written"] == {"mean": 0.0, "without": 3}
    assert [record["latents_written"] for record in read_records(tmp_path / "records.jsonl")] == [0, 0, 0]
    assert "3 of 3 answers came without latents" in caplog.text
    forced = {"latents": "off", "batch_size": 3, "data_root": microlab_data, "limit": 3}
    caplog.clear()
    summary = evaluate(emitting, ["microlab_test"], tmp_path / "off", **forced)
    assert "without latents" not in caplog.text and summary is not None and summary["latents"] == "off"


def test_gaze_has_the_latents_in_their_place(lab: Any, samples: list[Sample], tmp_path: Path) -> None:
    """The same weights seen as forced, emitted and of varying number: the same rows of the same sequences."""
    student, found = lab.student(4, dtype="float32"), []
    for name, layout in (("forced", {}), ("emitted", {"emitted": True}), ("varying", {"least": 1})):
        student.backbone.save(tmp_path / name)
        (tmp_path / name / "laavit.json").write_text(json.dumps({"latents": 4, "layout": {"most": 4, **layout}}))
        found.append(look(Looker(name, str(tmp_path / name), ("latents", "predicting")), samples[:2]))
    for forced, *others in zip(*found, strict=True):
        for other in others:
            assert torch.equal(forced.gaze, other.gaze) and forced.mass == other.mass
    (tmp_path / "forced" / "laavit.json").write_text(json.dumps({"latents": 0}))
    with pytest.raises(UserError, match="has no latents"):
        look(Looker("a", str(tmp_path / "forced"), ("latents",)), samples[:1])


def test_another_number_of_fed_back_latents(export: Path, tmp_path: Path) -> None:
    """N of those are what an export whose template writes N would have, and not N learned ones."""
    varying = with_layout(export, tmp_path / "varying", least=1, feedback=True)
    for number in (1, 3, 4):
        asked = Laavit(str(varying), latents=number)
        assert asked.backbone is not None
        own = with_layout(export, tmp_path / str(number), number, most=number, feedback=True)
        learned = with_layout(export, tmp_path / f"learned-{number}", number, most=number)
        found = asked.answer(CHATS, Settings(6, ()))
        assert found == Laavit(str(own)).answer(CHATS, Settings(6, ()))
        assert found != Laavit(str(learned)).answer(CHATS, Settings(6, ()))
