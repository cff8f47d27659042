"""Interventions on latents: what enters every layer at the latents, and that nothing else is touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILY_NAMES, tiny
from PIL import Image
from torch import Tensor

from laavit.backbones import Backbone
from laavit.evaluation.bridge import Laavit, Settings
from laavit.evaluation.interventions import (
    FirstLatent,
    Intervention,
    LatentIntervention,
    MaskLatents,
    MeanLatent,
    NoisedLatents,
    OracleLatents,
    Question,
    Questions,
    SwappedLatents,
    ZeroedLatents,
)
from laavit.evaluation.interventions.boxes import without
from laavit.evaluation.interventions.observing import Observer, centre_of
from laavit.evaluation.interventions.states import Reading, read
from laavit.latents import LearnedLatents, latent_tokens

WRITTEN = "".join(latent_tokens(4))
SETTINGS = Settings(6, ())
#: three of unequal length about two images
ASKED = (("what colour is left of the red circle ?", 1), ("how many ?", 2), ("is the square left of the circle ?", 1))


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def chat(question: str, image: Image.Image) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def asked() -> list[Question]:
    docs = [{"boxes": [[0.25, 0.0, 0.75, 0.5]]}] * len(ASKED)
    chats = [chat(text, picture(seed)) for text, seed in ASKED]
    return list(Questions("task", ASKED, lambda number: (docs[number], chats[number])))


def with_layout(export: Path, folder: Path, template: int, **layout: Any) -> Path:
    """A copy of the export with another layout, its template writing ``template`` latents."""
    shutil.copytree(export, folder)
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace(WRITTEN, "".join(latent_tokens(template))))
    card = json.loads((folder / "laavit.json").read_text())
    (folder / "laavit.json").write_text(json.dumps(card | {"layout": {"most": 4, **layout}}))
    return folder


@pytest.fixture(scope="module", params=["learned", "feedback", "emitted"])
def model(request: pytest.FixtureRequest, export: Path, tmp_path_factory: pytest.TempPathFactory) -> Laavit:
    """The same weights with latents in the prompt, fed back, and written by the model, now and then."""
    folder = tmp_path_factory.mktemp("own") / request.param
    if request.param == "learned":
        return Laavit(str(export))
    if request.param == "feedback":
        return Laavit(str(with_layout(export, folder, 4, feedback=True)))
    made = Laavit(str(with_layout(export, folder, 0, emitted=True)))
    ids = made.tokenizer.convert_tokens_to_ids(latent_tokens(4))
    words = made.tokenizer.convert_tokens_to_ids(["first", "A", "green", "circle", "square"])
    with torch.no_grad():
        made.model.lm_head.weight[ids] = 1.5 * made.model.lm_head.weight[words]
    return made


@contextmanager
def entrances(model: Laavit) -> Iterator[list[list[Tensor]]]:
    """What enters each decoder layer, pass by pass.

    A layer's first normalisation is what reads its input, so it sees what the hooks before the layer left.
    """
    seen: list[list[Tensor]] = [[] for _ in model.decoder.layers]
    handles = [
        layer.input_layernorm.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].clone()))
        for layer, kept in zip(model.decoder.layers, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class FirstTokens(Observer):
    """Keeps the distributions of the answers' first tokens, and compares nothing."""

    def __init__(self) -> None:
        super().__init__({}, None)
        self.first: list[Tensor] = []

    def _measured(self, question: Question, shares: Tensor, states: Any) -> dict[str, float | None]:
        self.first.append(shares)
        return {}


def answered(
    model: Laavit, part: Intervention | None, questions: Sequence[Question]
) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Answers, their first tokens' distributions, and what entered each layer [B, all columns, D]."""
    noted = FirstTokens()
    with entrances(model) as seen, model.altered(part, noted, {}):
        results = model.answer_and_count([q.chat for q in questions], SETTINGS, questions)
    return [answer.text for answer, _ in results], noted.first, [torch.cat(passes, 1) for passes in seen]


def readings_of(model: Laavit, questions: Sequence[Question]) -> list[Reading]:
    return read(model, [question.chat for question in questions])


def test_latents_given_their_own_states_change_no_bit(model: Laavit) -> None:
    questions = asked()
    plain, same = answered(model, None, questions), answered(model, LatentIntervention(), questions)
    assert plain[0] == same[0]
    for one, two in zip(plain[1], same[1], strict=True):
        assert torch.equal(one, two)
    # the reading that came first is part of what entered
    for one, two in zip(plain[2], same[2], strict=True):
        assert torch.equal(one, two[:, -one.shape[1] :])


def test_every_position_before_the_latents_is_untouched_and_later_ones_read_the_new_states(model: Laavit) -> None:
    """With -states of their own: bit for bit the same before, exactly that at the latents, something else after."""
    if model.layout.emitted:
        pytest.skip("what is written after an intervention differs, and so do the columns")

    class Negated(LatentIntervention):
        def replaced(self, states: Tensor, question: Question) -> Tensor:
            return -states

    questions = asked()
    length = model.encode([q.chat for q in questions])["input_ids"].shape[1]
    plain, other = answered(model, None, questions), answered(model, Negated(), questions)
    readings = readings_of(model, questions)
    for layer, (one, two) in enumerate(zip(plain[2], other[2], strict=True)):
        two = two[:, length:]  # after the reading
        assert torch.equal(one[:, : length - 5], two[:, : length - 5])
        for row, reading in enumerate(readings):
            assert reading.latents is not None
            assert torch.equal(two[row, length - 5 : length - 1], -reading.latents.layers[:, layer])
        after = slice(length - 1, length)
        assert torch.equal(one[:, after], two[:, after]) == (layer == 0)  # the separator itself is a token
    assert not any(torch.equal(one, two) for one, two in zip(plain[1], other[1], strict=True))


def test_what_was_read_is_what_the_decoder_says(export: Path) -> None:
    """transformers' own hidden states of one unpadded prompt."""
    model, [question, *_] = Laavit(str(export)), asked()
    [reading] = readings_of(model, [question])
    inputs = model.encode([question.chat])
    with torch.no_grad():
        states = model.model(**inputs, output_hidden_states=True).hidden_states
    assert reading.latents is not None and bool(reading.latents.seen.all())
    for layer, wanted in enumerate(states[:-1]):
        assert torch.allclose(reading.latents.layers[:, layer], wanted[0, -5:-1], atol=1e-5)
    assert torch.allclose(reading.latents.final, states[-1][0, -5:-1], atol=1e-5)


def written(part: LatentIntervention, reading: Reading, question: Question) -> Tensor:
    assert reading.latents is not None
    return part._written(reading.latents, question).layers


def test_what_each_kind_makes_of_the_states(export: Path) -> None:
    model, questions = Laavit(str(export)), asked()
    for question, reading in zip(questions, readings_of(model, questions), strict=True):
        assert reading.latents is not None
        own = reading.latents.layers
        assert own.shape == (4, 2, 32) and torch.equal(written(LatentIntervention(), reading, question), own)
        assert not written(ZeroedLatents(), reading, question).any()
        first, mean = written(FirstLatent(), reading, question), written(MeanLatent(), reading, question)
        assert all(torch.equal(one, own[0]) for one in first)
        assert all(torch.allclose(one, own.double().mean(0).float()) for one in mean)
        noise = written(NoisedLatents(seed=3), reading, question)
        assert torch.allclose(noise.norm(dim=-1), own.norm(dim=-1), rtol=1e-5)
        assert abs(float(torch.cosine_similarity(noise, own, dim=-1).mean())) < 0.3
        assert torch.equal(written(NoisedLatents(seed=3), reading, question), noise)
        assert not torch.equal(written(NoisedLatents(seed=4), reading, question), noise)
        assert torch.equal(written(NoisedLatents(share=0.0), reading, question), own)
        half = written(NoisedLatents(share=0.5, seed=3), reading, question)
        assert torch.allclose(half, (noise + own) / 2, atol=1e-6)
    kinds = [written(NoisedLatents(), reading, question) for question in questions]
    assert not torch.equal(kinds[0], kinds[1])  # every question has noise of its own


def test_latents_that_were_not_read_stay_out(export: Path) -> None:
    model, questions = Laavit(str(export)), asked()
    [reading, *_] = readings_of(model, questions)
    assert reading.latents is not None
    seen = torch.tensor([False, True, True, False])
    partial = Reading(type(reading.latents)(reading.latents.layers, reading.latents.final, seen), reading.first)
    own = reading.latents.layers
    found = written(MeanLatent(), partial, questions[0])
    assert torch.equal(found[~seen], own[~seen])
    assert torch.allclose(found[1], own[1:3].mean(0), atol=1e-6) and torch.equal(found[1], found[2])
    assert torch.equal(written(FirstLatent(), partial, questions[0])[2], own[1])


def test_swapped_latents_and_the_oracle_are_those_of_other_readings(model: Laavit) -> None:
    """By hand: the donors are read as one batch, and what they hold enters."""
    if model.layout.emitted:
        pytest.skip("columns are known beforehand for latents in the prompt alone")
    questions = asked()
    others = [question.partner(5) for question in questions]
    assert [other.number for other in others if other is not None] == [1, others[1].number, 1]  # type: ignore[union-attr]
    donors = {
        SwappedLatents(5): [other.chat for other in others if other is not None],
        OracleLatents(): [question.with_images([without(question, "outside")]) for question in questions],
    }
    for part, chats in donors.items():
        entered = answered(model, part, questions)[2]
        for layer, found in enumerate(entered):
            for row, reading in enumerate(read(model, chats)):
                assert reading.latents is not None
                wanted = reading.latents.layers[:, layer]
                assert torch.equal(found[row, _latents_at(found)], wanted)


def _latents_at(found: Tensor) -> slice:
    """The latents' columns of the last reading, counted from the end of the answers."""
    steps = SETTINGS.max_new_tokens - 1
    return slice(found.shape[1] - steps - 5, found.shape[1] - steps - 1)


def test_remembered_readings_spare_a_reading(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, questions = Laavit(str(export)), asked()
    readings = {q.key: one for q, one in zip(questions, readings_of(model, questions), strict=True)}
    wanted = {part: answered(model, part, questions)[:2] for part in (FirstLatent(), SwappedLatents(1))}
    monkeypatch.setattr("laavit.evaluation.interventions.latents.read", lambda *_: pytest.fail("read again"))
    for part, (texts, first) in wanted.items():
        observer = Observer(readings, None)
        with model.altered(part, observer, readings):
            found = model.answer_and_count([q.chat for q in questions], SETTINGS, questions)
        assert [answer.text for answer, _ in found] == texts
        assert all(one is not None and one["kl"] > 0 for one in observer.found.values()) and first


def handmade(export: Path) -> Laavit:
    """Only what the separator reads of latents decides: an odd function of their states.

    No MLP, attention without queries (all that is visible counts alike), no biases, a separator of zeros: whatever
    enters the layers negated leaves them negated.
    """
    model = Laavit(str(export))
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.k_proj.weight.zero_()
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).bias.zero_()
        end = model.tokenizer.convert_tokens_to_ids("<|latent_end|>")
        model.model.get_input_embeddings().weight[end] = 0
    return model


class OnlyLatents(LatentIntervention):
    """Separator and latents are all that attention finds; the latents' states are multiplied."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, model: Any, inputs: Any, ids: Sequence[int]) -> dict[str, Tensor]:
        shown = inputs["attention_mask"].clone()
        shown[:, :-5] = 0
        positions = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
        return {**inputs, "attention_mask": shown, "position_ids": positions}

    def replaced(self, states: Tensor, question: Question) -> Tensor:
        return self.factor * states


class NoLatents(MaskLatents):
    """Latents that nobody sees; their states are noise."""

    noised = NoisedLatents()

    def states(self, model: Any, questions: Any, inputs: Any) -> Any:
        return self.noised.states(model, questions, inputs)


def changed(model: Laavit, one: Intervention, two: Intervention) -> tuple[float, list[bool]]:
    """The share of changed answers, and of which questions the first token's distribution is the same."""
    questions = asked()
    first, second = answered(model, one, questions), answered(model, two, questions)
    share = sum(a != b for a, b in zip(first[0], second[0], strict=True)) / len(questions)
    return share, [torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True)]


def test_an_answer_that_rests_on_the_latents_alone_changes_always(export: Path) -> None:
    model = handmade(export)
    assert changed(model, OnlyLatents(1.0), OnlyLatents(1.0)) == (0.0, [True] * 3)
    assert changed(model, OnlyLatents(1.0), OnlyLatents(-1.0)) == (1.0, [False] * 3)


def test_an_answer_that_never_sees_the_latents_never_changes(export: Path) -> None:
    model = Laavit(str(export))
    assert changed(model, MaskLatents(), NoLatents()) == (0.0, [True] * 3)
    assert changed(model, LatentIntervention(), NoisedLatents())[1] == [False] * 3


def test_written_latents_are_read_and_replaced_where_they_come(model: Laavit) -> None:
    if not model.layout.emitted:
        pytest.skip("latents in the prompt")
    questions = asked()
    readings = readings_of(model, questions)
    seen = torch.stack([one.latents.seen for one in readings if one.latents is not None])
    assert seen.any() and not seen.all()
    texts, first, _ = answered(model, ZeroedLatents(), questions)
    for row in range(len(questions)):
        same = torch.equal(first[row], answered(model, None, questions)[1][row])
        assert same or bool(seen[row].any())  # without latents there is nothing to replace
    assert len(texts) == 3


def test_a_model_kept_from_writing_its_latents_differs_by_a_finite_kl(model: Laavit) -> None:
    """How answers begin is told by words alone: latents have some probability before, and none when forbidden."""
    if not model.layout.emitted:
        pytest.skip("latents in the prompt")
    questions = asked()
    readings = {q.key: one for q, one in zip(questions, readings_of(model, questions), strict=True)}
    observer = Observer(readings, None)
    with model.altered(MaskLatents(), observer, readings):
        model.answer_and_count([q.chat for q in questions], SETTINGS, questions)
    measured = [found["kl"] for found in observer.found.values() if found is not None]
    assert len(measured) == 3 and max(measured) < 100
    first = readings[questions[0].key].first
    assert float(first.exp().sum()) == pytest.approx(1) and bool((first[sorted(model.markup)] == -torch.inf).all())


def test_the_image_moves_the_latents(export: Path) -> None:
    """The shift of an observer, by hand: other images against the same; its distribution, too."""
    model, questions = Laavit(str(export)), asked()
    readings = {q.key: one for q, one in zip(questions, readings_of(model, questions), strict=True)}

    class Other(Intervention):
        def chats(self, questions: Sequence[Question]) -> list[Any]:
            return [q.with_images([picture(9 if q.number else ASKED[0][1])]) for q in questions]

        def applies(self, question: Question) -> bool:
            return question.number < 2

    observer = Observer(readings, centre_of([one.latents for one in readings.values() if one.latents is not None]))
    with model.altered(Other(), observer, readings):
        model.answer_and_count([q.chat for q in questions], SETTINGS, questions)
    same, other, left_out = (observer.found[q.key] for q in questions)
    assert left_out is None and same is not None and other is not None
    assert same["kl"] == 0 and same["latent_shift"] == pytest.approx(0, abs=1e-6)
    changed_chats = Other().chats(questions)
    after = read(model, changed_chats)[1].latents
    before = readings[questions[1].key].latents
    assert after is not None and before is not None
    wanted = 1 - torch.cosine_similarity(before.final.double(), after.final.double(), dim=-1)
    assert other["latent_shift"] == pytest.approx(float(wanted.mean())) and other["latent_shift"] > 0
    assert other["kl"] > 0 and other["latent_shift_centred"] != other["latent_shift"]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family(family: str, tmp_path: Path) -> None:
    """Given its own states nothing changes, given zeros something does."""
    backbone = Backbone.load(str(tiny(family, tmp_path / family)))
    LearnedLatents(4, noise=0.5).add_to(backbone.model, backbone.tokenizer, torch.Generator().manual_seed(0))
    text: Callable[[str], str] = lambda name: getattr(backbone.processor, name)  # noqa: E731
    backbone.processor.chat_template = (
        text("chat_template") + "{% if add_generation_prompt %}" + WRITTEN + "{% endif %}"
    )
    backbone.save(tmp_path / "export")
    (tmp_path / "export" / "laavit.json").write_text(json.dumps({"latents": 4}))
    model, questions = Laavit(str(tmp_path / "export")), asked()
    plain, same, zeroed = (answered(model, part, questions) for part in (None, LatentIntervention(), ZeroedLatents()))
    assert plain[0] == same[0]
    for one, two, three in zip(plain[1], same[1], zeroed[1], strict=True):
        assert torch.equal(one, two) and not torch.equal(one, three)
