"""Latents that are fed back: Eq. 9 in float64 against whole passes, checkpointing, training as inference, exports."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from laavit.backbones import Backbone, PromptSettings
from laavit.backbones.chat import IGNORED
from laavit.backbones.unrolling import fed_back
from laavit.cli import run as cli_run
from laavit.commands.export import export_run
from laavit.evaluation.bridge import Laavit, Settings
from laavit.evaluation.gaze import Looker, look
from laavit.flex_attention import FLEX
from laavit.gates import ConstantGate, Gate
from laavit.latents import FeedbackLatents, LatentLayout, check_attention, latent_tokens
from laavit.model import LaViT
from laavit.registry import UserError
from laavit.structures import Batch, Role, Sample, StudentOutput
from laavit.students import HFStudent
from laavit.targets import ConceptTarget, RegionTarget, Target, TrajectoryTarget

CLOSED = ("answer->image", "question->image", "latent->image")


def student_of(lab: Any, latents: FeedbackLatents) -> HFStudent:
    student = HFStudent(str(lab.folder), "float64")
    student.setup(latents, torch.Generator().manual_seed(3))
    return student


def model_of(lab: Any, gate: Gate | None = None, count: Any = 3, scale: str = "none", bare: bool = False) -> LaViT:
    targets: dict[str, Target] = {
        "concept": ConceptTarget(),
        "trajectory": TrajectoryTarget(rows=("question", "latents", "separator")),
        "region": RegionTarget(),
    }
    return lab.model({} if bare else targets, gate, student_of(lab, FeedbackLatents(count, noise=0.5, scale=scale)))


def losses(model: LaViT, output: StudentOutput, batch: Batch) -> Tensor:
    """Eq. 9."""
    total = F.cross_entropy(output.logits, output.labels)
    for name, target in model.named_targets.items():
        total = total + target.weight * target(output, batch.roles, batch.targets[name])
    return total


def gradients(model: LaViT, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- Eq. 9 ------------------------------------------------------------------------------------------------------------


def whole_passes(lab: Any, model: LaViT, batch: Batch, bias: float, scale: bool) -> tuple[StudentOutput, Any]:
    """The most latents of a sample and one more passes of an eager twin, without a cache; the states are written in."""
    twin = lab.eager(model)
    length, (_, positions) = batch.roles.shape[1], model.context(batch)
    mask = torch.full((len(batch.samples), 1, length, length), -torch.inf, dtype=torch.float64).triu(1)
    for b, roles in enumerate(batch.roles.tolist()):
        seen = roles.index(Role.IMAGE)
        for i in range(length):
            question = i > seen and roles[i] in (Role.QUESTION, Role.OTHER)
            inside = any(span.start <= i < span.stop for span in batch.spans[b])
            if (roles[i] == Role.ANSWER or question) and not inside:
                mask[b, 0, i, [j for j in range(i) if roles[j] == Role.IMAGE]] = bias
    table = twin.get_input_embeddings().weight
    size = table.detach().pow(2)
    ids = model.student.backbone.tokenizer.convert_tokens_to_ids(latent_tokens(3))
    keep = [i for i in range(len(size)) if i not in ids]
    rms = size[keep].mean().sqrt()
    states: dict[tuple[int, int], Tensor] = {}
    embeddings: list[Tensor] = []

    def change(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        read = kwargs["inputs_embeds"].clone()
        for (b, column), state in states.items():
            read[b, column] = state * rms / state.pow(2).mean().sqrt() if scale else state
        embeddings.append(read)
        return args, {**kwargs, "inputs_embeds": read}

    twin.model.language_model.register_forward_pre_hook(change, with_kwargs=True)
    for _ in range(model.student.latents + 1):
        out = twin(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, output_attentions=True,
            output_hidden_states=True, **batch.vision,
        )  # fmt: skip
        hidden = out.hidden_states[-1]
        for b, column in (batch.roles == Role.LATENT).nonzero().tolist():
            states[b, column] = hidden[b, column - 1]
    rows = torch.cat(list(positions.values()), 1).clamp(min=0)
    maps = {
        layer: each.mean(1).gather(1, rows[:, :, None].expand(-1, -1, length))
        for layer, each in enumerate(out.attentions)
    }
    asked = batch.labels != IGNORED
    return StudentOutput(hidden, out.logits[asked], batch.labels[asked], maps, positions, embeddings[-1]), twin


@pytest.mark.parametrize(("gamma", "count", "scale"), [(0.3, 3, "none"), (0.0, (1, 3), "vocabulary")])
def test_loss_and_gradients_equal_whole_passes(
    lab: Any, samples: list[Sample], gamma: float, count: Any, scale: str
) -> None:
    """Both paths gated, prompts of unequal length, several images; K latents, and a number of each sample's own."""
    model = model_of(lab, ConstantGate(gamma, CLOSED[:2]), count, scale)
    if count != 3:
        del model.targets["concept"], model.targets["region"]
        samples = [replace(sample, id=name) for sample, name in zip(samples, "abh", strict=True)]
        counts = [model.student.layout.count_of(sample.id) for sample in samples]
        assert len(set(counts)) > 1
    batch = lab.batch(model, samples)
    assert len({(row == Role.LATENT).nonzero()[0].item() for row in batch.roles}) == 3
    output = model.observe(batch)
    expected, twin = whole_passes(lab, model, batch, math.log(gamma) if gamma else -math.inf, scale == "vocabulary")
    assert output.row_positions.keys() == expected.row_positions.keys()
    for layer, rows in output.rows.items():
        torch.testing.assert_close(rows, expected.rows[layer], rtol=0, atol=1e-10)
    real = batch.roles != Role.OTHER
    torch.testing.assert_close(output.hidden[real], expected.hidden[real], rtol=0, atol=1e-9)
    loss, wanted = losses(model, output, batch), losses(model, expected, batch)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
    assert torch.equal(model(batch)["loss"], loss)

    found = gradients(model, loss)
    heads = {name: found.pop(name) for name in list(found) if name.startswith("targets.")}
    model.zero_grad(set_to_none=True)
    wanted.backward()
    names = [name for name, p in twin.named_parameters() if p.grad is not None]
    assert {f"student.model.{name}" for name in names} == set(found) and len(names) > 20
    for name in names:
        gradient = twin.get_parameter(name).grad
        exact = 2e-6 * float(gradient.abs().max())  # norms round to float32 on their way, passes in another order
        torch.testing.assert_close(found[f"student.model.{name}"], gradient, rtol=0, atol=exact, msg=name)
    for name, gradient in heads.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=0, atol=1e-7, msg=name)


def test_checkpointing_changes_nothing_and_lets_go(lab: Any, samples: list[Sample]) -> None:
    """Equal bits of loss and gradients; after the backward pass the kept keys are gone."""
    model, found = model_of(lab, ConstantGate(0.3, CLOSED[:2])), []
    batch = lab.batch(model, samples)
    for checkpointing in (False, True):
        if checkpointing:
            model.student.model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.student.model.model.language_model.layers[0].gradient_checkpointing
        output = model.observe(batch)
        loss = losses(model, output, batch)
        found.append((loss.detach(), gradients(model, loss)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-12, atol=1e-13, msg=name)
    states = weakref.ref(output.hidden)
    rows = weakref.ref(output.rows[0])
    del output, loss
    gc.collect()
    assert states() is None and rows() is None


# --- training is inference --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(lab: Any, samples: list[Sample]) -> tuple[LaViT, Batch]:
    """A student that knows its three answers by heart."""
    model = model_of(lab, scale="vocabulary", bare=True)
    batch = lab.batch(model, samples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        output = model.observe(batch)
        if torch.equal(output.logits.argmax(-1), output.labels):
            break
        losses(model, output, batch).backward()
        optimizer.step()
    return model.eval(), batch


@torch.no_grad()
def test_what_is_learned_is_what_is_generated(learned: tuple[LaViT, Batch], samples: list[Sample]) -> None:
    model, batch = learned
    output = model.observe(batch)
    assert torch.equal(output.logits.argmax(-1), output.labels)
    backbone = model.student.backbone
    prompts = [
        model.student.builder(PromptSettings(system="You are a helpful assistant.")).prompt_of(s) for s in samples
    ]
    assert backbone.generate(prompts, 12) == [sample.answer for sample in samples]
    assert [backbone.generate([prompt], 12)[0] for prompt in prompts] == [sample.answer for sample in samples]
    features = [torch.cat(backbone.family.image_features(backbone.model, p.vision)) for p in prompts]
    cached = [replace(p, features=f) for p, f in zip(prompts, features, strict=True)]
    assert backbone.generate(cached, 12) == [sample.answer for sample in samples]


@torch.no_grad()
def test_the_first_logits_are_those_of_training(learned: tuple[LaViT, Batch], samples: list[Sample]) -> None:
    """Left-padded, cached, as ``generate`` goes on from it; and other ones once nothing is fed back."""
    model, batch = learned
    backbone = model.student.backbone
    hidden = backbone.forward(batch)
    wanted = [backbone.logits(hidden[b, (row == Role.ANSWER).nonzero()[0, 0]]) for b, row in enumerate(batch.roles)]
    builder = model.student.builder(PromptSettings(system="You are a helpful assistant."))
    prompts = [builder.prompt_of(sample) for sample in samples]
    length = max(len(p.input_ids) for p in prompts)
    ids = torch.stack([F.pad(p.input_ids, (length - len(p.input_ids), 0), value=0) for p in prompts])
    mask = torch.stack([F.pad(torch.ones_like(p.input_ids), (length - len(p.input_ids), 0)) for p in prompts])
    given = {"input_ids": ids, "attention_mask": mask, **backbone.family.text_inputs(ids)}
    given |= backbone.family.inputs(backbone.family.batch([p.vision for p in prompts]))
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    out = backbone.model.generate(**fed_back(backbone, given), **options)
    torch.testing.assert_close(out.logits[0].double(), torch.stack(wanted), rtol=0, atol=1e-5)
    plain = backbone.model.generate(**given, **options)
    assert (plain.logits[0] - out.logits[0]).abs().max() > 0.01


@torch.no_grad()
def test_pixels_come_through_the_states_alone(lab: Any, samples: list[Sample], tmp_path: Path) -> None:
    """Answer and question closed: other pixels move the answer through the latents; all closed: not one bit."""
    Image.effect_noise((48, 32), 80).convert("RGB").save(tmp_path / "other.png")
    other = [replace(samples[0], images=(tmp_path / "other.png",))]
    moved = {}
    for paths in (CLOSED, CLOSED[:2]):
        model = model_of(lab, ConstantGate(0.0, paths), bare=True)
        one, two = (model.observe(lab.batch(model, each)).logits for each in (samples[:1], other))
        moved[paths] = float((one - two).abs().max())
    assert moved[CLOSED] == 0.0 and moved[CLOSED[:2]] > 1e-4


# --- a run and its export ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("feedback")
    text = project.read_text().replace('dict(name="learned"', 'dict(name="feedback", scale="vocabulary"')
    recipe = run / "cfg.py"
    recipe.write_text(text)
    words = ["--train.gradient_checkpointing", "true"]
    assert cli_run("train", [str(recipe), "--work-dir", str(run / "run"), *words]) == 0
    return export_run(run / "run", run / "export")


def test_an_export_answers_as_its_run(exported: Path, samples: list[Sample]) -> None:
    model = Laavit(str(exported))
    assert model.backbone is not None and LatentLayout(**model.export["layout"]).feedback
    backbone = Backbone.load(str(exported))
    assert backbone.layout == LatentLayout(4, 4, feedback=True, scale="vocabulary")
    backbone.model.eval()
    builder = backbone.builder(PromptSettings(system="You look closely."), backbone.layout)
    wanted = backbone.generate([builder.prompt_of(sample) for sample in samples], 8)
    chats = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": Image.open(path)} for path in sample.images),
                    {"type": "text", "text": sample.question},
                ],
            }
        ]
        for sample in samples
    ]
    texts = [answer.text.strip() for answer in model.answer(chats, Settings(8, ()))]
    assert texts == wanted and len(set(texts)) > 1
    off = [answer.text.strip() for answer in Laavit(str(exported), latents="off").answer(chats, Settings(8, ()))]
    backbone.layout = LatentLayout(4)
    placeholders = backbone.generate([builder.prompt_of(sample) for sample in samples], 8)
    assert len({tuple(texts), tuple(off), tuple(placeholders)}) == 3


def test_an_export_looks_as_it_was_trained(exported: Path, samples: list[Sample]) -> None:
    """The rows of an export's latents are those of fed-back latents."""
    looker = Looker("student", str(exported), rows=("latents",))
    fed = look(looker, samples)
    card = (exported / "laavit.json").read_text()
    try:
        (exported / "laavit.json").write_text(card.replace('"feedback": true', '"feedback": false'))
        plain = look(looker, samples)
    finally:
        (exported / "laavit.json").write_text(card)
    assert all((a.gaze - b.gaze).abs().max() > 1e-5 for a, b in zip(fed, plain, strict=True))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_refused(lab: Any, samples: list[Sample]) -> None:
    with pytest.raises(UserError, match=r"latents.scale: got 'vocab'; .*did you mean 'vocabulary'"):
        FeedbackLatents(scale="vocab")
    with pytest.raises(UserError, match=r"attention: latents that are .* 'sdpa' keeps no keys"):
        check_attention(FeedbackLatents().layout, "sdpa")
    check_attention(FeedbackLatents().layout, FLEX)
    check_attention(LatentLayout(4), "sdpa")
    model = model_of(lab, bare=True)
    batch = lab.batch(model, samples)
    batch.roles[1] = batch.roles[1].masked_fill(batch.roles[1] == Role.LATENT, int(Role.OTHER))
    with pytest.raises(UserError, match="sample 'b' has no latents"):
        model(batch)
    backbone = model.student.backbone
    ids = batch.input_ids[:, :40]
    with pytest.raises(UserError, match="a prompt does not end with latents"):
        fed_back(backbone, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    builder = model.student.builder(PromptSettings())
    with pytest.raises(UserError, match=r"which gradient checkpointing drops: call model.eval\(\)"):
        backbone.generate([builder.prompt_of(samples[0])], 4)
    with pytest.raises(UserError, match=r"take extract.passes=2"):
        backbone.generate([builder.prompt_of(samples[0])], 4, cache=DynamicCache())
