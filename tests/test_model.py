"""LaViT in one piece: Eq. 9 in float64, who gets a gradient, what a gate hides, batches, caches and checkpoints."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from laavit.backbones import PromptSettings
from laavit.backbones.vision_cache import VisionCache
from laavit.gates import ConstantGate, CosineGate, Gate
from laavit.latents import latent_tokens
from laavit.model import LaViT
from laavit.registry import UserError
from laavit.structures import Batch, Role, Sample
from laavit.targets import ConceptTarget, TrajectoryTarget

ALL_CLOSED = ("answer->image", "question->image", "latent->image")


def run(model: LaViT, batch: Batch) -> dict[str, Tensor]:
    return model(batch, mode="loss")


def gradients(model: LaViT, loss: Tensor) -> dict[str, Tensor]:
    """Non-zero gradients of a loss by parameter name."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: gradient for name, gradient in found.items() if gradient.abs().max() > 0}


# --- Eq. 9 ------------------------------------------------------------------------------------------------------------


def plain_losses(lab: Any, model: LaViT, batch: Batch, bias: float) -> tuple[dict[str, Tensor], Any]:
    """Every term written out over an eager twin's maps, states and logits, under an additive mask [B, 1, S, S]."""
    twin, (count, length) = lab.eager(model), batch.input_ids.shape
    mask = torch.full((count, 1, length, length), -math.inf, dtype=torch.float64).triu(1)
    for b in range(count):
        for i in range(length):
            for j in range(i):
                if batch.roles[b, i] == Role.ANSWER and batch.roles[b, j] == Role.IMAGE:
                    mask[b, 0, i, j] = bias
    out = twin(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, output_attentions=True,
        output_hidden_states=True, **batch.vision,
    )  # fmt: skip
    states = out.hidden_states[-1]
    ntp, words = torch.zeros((), dtype=torch.float64), 0
    concept, trajectory = torch.zeros_like(ntp), torch.zeros_like(ntp)
    head = model.named_targets["concept"].head
    for b, sample in enumerate(batch.samples):
        answer = model.student.backbone.tokenizer.encode(sample.answer) + [twin.generation_config.eos_token_id]
        end = max(i for i in range(length) if batch.roles[b, i] == Role.ANSWER) + 1
        assert batch.input_ids[b, end - len(answer) : end].tolist() == answer
        for i, token in zip(range(end - len(answer), end), answer, strict=True):
            ntp, words = ntp - out.logits[b, i - 1].log_softmax(-1)[token], words + 1
        latents = [i for i in range(length) if batch.roles[b, i] == Role.LATENT]
        middle = F.gelu(head[0].weight @ states[b, latents[-1]] + head[0].bias)
        given, wanted = head[2].weight @ middle + head[2].bias, batch.targets["concept"]["semantics"][b].double()
        concept = concept + 1 - given @ wanted / (given.norm() * wanted.norm())
        image = [i for span in batch.spans[b] for i in range(span.start, span.stop)]
        target = batch.targets["trajectory"]["gaze"][b][: len(image)]
        for latent in latents:
            row = torch.stack([each[b, :, latent, image] for each in out.attentions]).mean((0, 1))
            share = row / row.sum()
            trajectory = trajectory + sum(t * (t / s).log() for t, s in zip(target, share, strict=True) if t > 0)
    return {"ntp": ntp / words, "concept": concept / count, "trajectory": trajectory / count}, twin


@pytest.mark.parametrize("step", [0, 100, 400])
def test_total_loss_equals_equation_9_under_the_gate(lab: Any, samples: list[Sample], step: int) -> None:
    targets = {"concept": ConceptTarget(weight=0.3), "trajectory": TrajectoryTarget(weight=0.7)}
    model = lab.model(targets, CosineGate(warmup=400))
    model.set_step(step)
    batch = lab.batch(model, samples)
    got = run(model, batch)
    bias = math.log(1e-6 + (1 - 1e-6) / 2 * (1 - math.cos(math.pi * step / 400)))
    expected, twin = plain_losses(lab, model, batch, bias)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value.detach(), rtol=1e-9, atol=1e-11, msg=name)
    total = expected["ntp"] + 0.3 * expected["concept"] + 0.7 * expected["trajectory"]
    torch.testing.assert_close(got["loss"], total, rtol=1e-9, atol=1e-11)
    assert got["gamma"] == pytest.approx(math.exp(bias))

    found = gradients(model, got["loss"])
    heads = {name: found.pop(name) for name in list(found) if name.startswith("targets.")}
    model.zero_grad(set_to_none=True)
    total.backward()
    names = [name for name, p in twin.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert {f"student.model.{name}" for name in names} == set(found)
    for name in names:
        torch.testing.assert_close(
            found[f"student.model.{name}"], twin.get_parameter(name).grad, rtol=1e-6, atol=1e-10, msg=name
        )
    for name, gradient in heads.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_emitted_latents_carry_a_loss_of_their_own(lab: Any, samples: list[Sample], weight: float) -> None:
    """L = L_ntp + weight * L_emit, each a mean over its own tokens, written out over an eager twin's logits."""
    model = lab.model({}, student=lab.student((1, 4), emitted=True, seed=1, emit_weight=weight))
    batch, tokenizer = lab.batch(model, samples), model.student.backbone.tokenizer
    losses, twin = run(model, batch), lab.eager(model)
    logits = twin(input_ids=batch.input_ids, position_ids=batch.position_ids, **batch.vision).logits.log_softmax(-1)
    answers, latents = [], []
    for b, (sample, count) in enumerate(zip(samples, (3, 1, 4), strict=True)):
        begin = batch.headers[b][1]
        written = tokenizer.convert_tokens_to_ids([*latent_tokens(4)[:count], "<|latent_end|>"])
        words = [*tokenizer.encode(sample.answer), twin.generation_config.eos_token_id]
        assert batch.input_ids[b, begin : begin + len(written) + len(words)].tolist() == written + words
        for i, token in enumerate(written + words):
            (latents if i < len(written) else answers).append(-logits[b, begin + i - 1, token])
    ntp, emit = sum(answers) / len(answers), sum(latents) / len(latents)
    torch.testing.assert_close(losses["ntp"], ntp.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(losses["emit"], emit.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(losses["loss"], ntp + weight * emit, rtol=1e-10, atol=1e-12)
    found = gradients(model, losses["loss"])
    expected = torch.autograd.grad(ntp + weight * emit, twin.get_input_embeddings().weight)[0]
    own = next(g for name, g in found.items() if name.endswith("embed_tokens.weight"))
    torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-12)


def test_a_gate_treats_emitted_latents_as_forced_ones(lab: Any, samples: list[Sample]) -> None:
    """Same positions, same paths: the answer's loss is equal to the last bit, under any gate."""
    gate, found = ConstantGate(0.3), []
    for emitted in (False, True):
        model = lab.model({}, gate, lab.student(4, emitted=emitted))
        found.append(run(model, lab.batch(model, samples))["ntp"])
    assert torch.equal(*found)


def test_only_the_total_carries_a_gradient(lab: Any, samples: list[Sample]) -> None:
    model = lab.model(gate=CosineGate())
    losses = run(model, lab.batch(model, samples[:1]))
    assert list(losses) == ["loss", "ntp", "concept", "trajectory", "gamma"]
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]
    assert not any(value.ndim for value in losses.values())


# --- liveness ---------------------------------------------------------------------------------------------------------

LAST = "student.model.model.language_model.layers.2."
EMBEDDING = "student.model.model.language_model.embed_tokens.weight"


def parts_of(model: LaViT, batch: Batch) -> dict[str, Tensor]:
    """Each loss by itself, with its gradient."""
    output = model.observe(batch)
    losses = {"ntp": F.cross_entropy(output.logits, output.labels)}
    return losses | {n: t(output, batch.roles, batch.targets[n]) for n, t in model.named_targets.items()}


def test_each_loss_reaches_the_parameters_it_should(lab: Any, samples: list[Sample]) -> None:
    model = lab.model()
    batch = lab.batch(model, samples)
    reached = {name: set(gradients(model, parts_of(model, batch)[name])) for name in ("ntp", "concept", "trajectory")}
    decoder = {n for n, p in model.student.named_parameters(prefix="student") if p.requires_grad}
    head = {name for name, _ in model.targets.named_parameters(prefix="targets")}
    final_norm = "student.model.model.language_model.norm.weight"
    assert not any("visual" in name for name in decoder) and len(head) == 4
    # The tower is frozen, the heads belong to their target alone.
    assert reached["ntp"] == decoder
    assert reached["concept"] == decoder | head
    # Attention rows of layer l depend on its queries and keys and on all layers below, on nothing above.
    above = {name for name in decoder if name.startswith(LAST) and not any(p in name for p in ("q_proj", "k_proj"))}
    above.discard(LAST + "input_layernorm.weight")
    # A key's bias shifts all scores of a row alike: softmax does not see it. M-RoPE turns it, so it is seen here.
    assert reached["trajectory"] == decoder - above - {final_norm}
    assert any("v_proj" in name for name in above) and any("mlp" in name for name in above)


def test_a_target_on_the_first_layer_leaves_the_second_alone(lab: Any, samples: list[Sample]) -> None:
    model = lab.model({"trajectory": TrajectoryTarget(layers=(0,))})
    batch = lab.batch(model, samples)
    reached = gradients(model, parts_of(model, batch)["trajectory"])
    assert reached and not any(".layers.1." in name or ".layers.2." in name for name in reached)


@pytest.mark.parametrize(
    ("freeze", "still"),
    [
        (("vision",), lambda name: "visual" in name),
        (("vision", "decoder"), lambda name: re.search(r"visual|language_model\.(layers|norm)\.", name)),
        (("vision", r"layers\.[01]\."), lambda name: "visual" in name or ".layers.0." in name or ".layers.1." in name),
        ((), lambda name: False),
    ],
)
def test_one_step_changes_what_learns_and_nothing_else(
    lab: Any, samples: list[Sample], freeze: tuple[str, ...], still: Any
) -> None:
    model = lab.model(student=lab.student(freeze=freeze))
    batch = lab.batch(model, samples)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for _, p in model.trainable_parameters()], lr=1e-2, weight_decay=0.0)
    run(model, batch)["loss"].backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith("targets.") or not still(name)}


def test_frozen_embeddings_let_the_latents_rows_learn(lab: Any, samples: list[Sample]) -> None:
    model = lab.model(student=lab.student(freeze=("vision", "embeddings")))
    batch = lab.batch(model, samples)
    weight = model.get_parameter(EMBEDDING)
    before = weight.detach().clone()
    run(model, batch)["loss"].backward()
    torch.optim.AdamW([p for _, p in model.trainable_parameters()], lr=1e-2, weight_decay=0.0).step()
    moved = (weight != before).any(1).nonzero().flatten().tolist()
    tokens = [f"<|latent_{i}|>" for i in (1, 2, 3, 4)] + ["<|latent_end|>"]
    assert moved == model.student.backbone.tokenizer.convert_tokens_to_ids(tokens)


# --- gate -------------------------------------------------------------------------------------------------------------


def repaint(samples: list[Sample], folder: Path) -> list[Sample]:
    """The same samples with other pixels in images of the same size."""
    random, changed = np.random.default_rng(9), []
    for sample in samples:
        paths = []
        for index, path in enumerate(sample.images):
            size = Image.open(path).size[::-1]
            paths.append(folder / f"{sample.id}-{index}.png")
            Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
        changed.append(Sample(sample.id, tuple(paths), sample.question, sample.answer, sample.boxes))
    return changed


@torch.no_grad()
def answer_logits(model: LaViT, batch: Batch) -> Tensor:
    return model.observe(batch).logits


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_closed_gate_hides_the_pixels_bit_for_bit(
    lab: Any, samples: list[Sample], tmp_path: Path, dtype: str
) -> None:
    others = repaint(samples, tmp_path)
    student = lab.student(dtype=dtype)
    moved = {}
    for paths in (ALL_CLOSED, ALL_CLOSED[:2], ALL_CLOSED[:1], ()):
        model = lab.model({}, ConstantGate(0.0, paths), student)
        one, two = (answer_logits(model, lab.batch(model, s)) for s in (samples, others))
        moved[paths] = (one - two).abs().max().item()
    assert moved.pop(ALL_CLOSED) == 0.0  # exactly: nothing else carries the image
    assert all(change > 1e-3 for change in moved.values()), moved  # through latents, question, or directly


def test_the_separator_lets_a_gate_reach_a_one_word_answer(lab: Any, samples: list[Sample]) -> None:
    student = lab.student()
    words = [s for s in samples if s.answer in ("blue", "no")]
    closed, opened = (lab.model({}, ConstantGate(value), student) for value in (0.0, 1.0))
    batch = lab.batch(closed, words)
    starts = (batch.labels >= 0).long().argmax(1)
    assert all(batch.roles[b, i] == Role.ANSWER and batch.roles[b, i - 1] == Role.LATENT for b, i in enumerate(starts))
    first = [int((batch.labels[:b] >= 0).sum()) for b in range(len(words))]  # each answer's first row of the logits
    difference = (answer_logits(closed, batch) - answer_logits(opened, batch)).abs().amax(1)
    assert (difference[first] > 1e-3).all()


@pytest.mark.parametrize("gate", [None, ConstantGate(0.0), ConstantGate(0.3, ALL_CLOSED)])
def test_a_later_token_leaves_earlier_logits_equal(lab: Any, samples: list[Sample], gate: Gate | None) -> None:
    model = lab.model({}, gate)
    batch = lab.batch(model, samples[1:2])  # an answer of several tokens
    before = answer_logits(model, batch)
    asked = (batch.labels[0] >= 0).nonzero().flatten().tolist()
    assert len(asked) >= 3
    for row, place in enumerate(asked[1:], start=1):
        edited = lab.batch(model, samples[1:2])
        edited.input_ids[0, place:] = edited.input_ids[0, place:].flip(0) + 7
        after = answer_logits(model, edited)
        assert torch.equal(after[:row], before[:row]) and not torch.equal(after[row:], before[row:])


def test_the_gate_reads_the_step_and_acts_in_training_only(lab: Any, samples: list[Sample]) -> None:
    model = lab.model({}, CosineGate(warmup=10))
    batch = lab.batch(model, samples)
    plain = answer_logits(lab.model({}, None, model.student), batch)
    seen = []
    for step in (0, 5, 10, 999):
        model.train()
        model.set_step(step)
        assert run(model, batch)["gamma"] == pytest.approx(CosineGate(warmup=10).gamma(step))
        seen.append((answer_logits(model, batch) - plain).abs().max().item())
        model.eval()
        assert torch.equal(answer_logits(model, batch), plain) and run(model, batch)["gamma"] == 1.0
    assert seen[0] > seen[1] > 0 and seen[2:] == [0.0, 0.0]


# --- K, initial rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 6, 8, 16])
def test_any_number_of_latents(lab: Any, samples: list[Sample], count: int) -> None:
    model = lab.model(gate=CosineGate(), student=lab.student(count))
    batch = lab.batch(model, samples)
    assert (batch.roles == Role.LATENT).sum(1).tolist() == [count] * 3
    losses = run(model, batch)
    found = gradients(model, losses["loss"])
    assert all(torch.isfinite(value) for value in losses.values())
    tokens = [f"<|latent_{i}|>" for i in range(1, count + 1)] + ["<|latent_end|>"]
    ids = model.student.backbone.tokenizer.convert_tokens_to_ids(tokens)
    assert (found[EMBEDDING][ids].abs().amax(1) > 0).all()


def test_naive_sft_has_neither_latents_nor_separator(lab: Any, samples: list[Sample]) -> None:
    student = lab.student(0)
    model = lab.model({}, student=student)
    batch = lab.batch(model, samples)
    vocabulary = student.backbone.tokenizer.get_vocab()
    assert not any(token.startswith("<|latent") for token in vocabulary)
    assert not (batch.roles == Role.LATENT).any()
    for b, (_, stop) in enumerate(batch.headers):  # the header's last position predicts the answer's first token
        assert (batch.labels[b] >= 0).nonzero()[0] == stop - 1 and batch.roles[b, stop] == Role.ANSWER
    losses = run(model, batch)
    assert list(losses) == ["loss", "ntp"] and torch.equal(losses["loss"], losses["ntp"])
    aligned = lab.model({"gaze": TrajectoryTarget(rows=("header", "answer"), reduction="mean")}, student=student)
    assert len(gradients(aligned, run(aligned, lab.batch(aligned, samples))["loss"])) > 20


# --- batches, caches, checkpoints -------------------------------------------------------------------------------------


def test_a_batch_is_its_samples(lab: Any, samples: list[Sample]) -> None:
    """Loss of a batch: ntp weighted by answer tokens, targets by samples; states to 1e-9."""
    model = lab.model(gate=ConstantGate(0.2))
    batch = lab.batch(model, samples)
    together, output = run(model, batch), model.observe(batch)
    weights, singles, start = [], [], 0
    for b, sample in enumerate(samples):
        alone = lab.batch(model, [sample])
        singles.append(run(model, alone))
        seen = model.observe(alone)
        length, count = alone.input_ids.shape[1], len(seen.labels)
        torch.testing.assert_close(output.hidden[b, :length], seen.hidden[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(output.logits[start : start + count], seen.logits, rtol=0, atol=1e-9)
        weights.append(count)
        start += count
    ntp = sum(w * s["ntp"] for w, s in zip(weights, singles, strict=True)) / sum(weights)
    torch.testing.assert_close(together["ntp"], ntp, rtol=1e-10, atol=1e-10)
    for name in ("concept", "trajectory"):
        mean = sum(single[name] for single in singles) / len(singles)
        torch.testing.assert_close(together[name], mean, rtol=1e-9, atol=1e-10)


def test_cached_features_equal_pixels(lab: Any, samples: list[Sample], tmp_path: Path) -> None:
    model = lab.model()
    items = lab.encode(model, samples)
    losses = []
    for attempt in range(3):  # worked out, from memory, from disk
        cache = VisionCache(tmp_path, model.student.backbone) if attempt != 1 else cache  # noqa: F821
        grids = [{k: v for k, v in item.vision.items() if k != "pixel_values"} for item in items]
        cached = [replace(i, features=cache.features(i), vision=grid) for i, grid in zip(items, grids, strict=True)]
        losses.append(run(model, lab.batch(model, samples, items=cached)))
    plain = run(model, lab.batch(model, samples, items=items))
    for found in losses:
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10)


def test_the_vision_cache_is_keyed_by_weights_and_pixels(lab: Any, samples: list[Sample], tmp_path: Path) -> None:
    model = lab.model()
    cache = VisionCache(tmp_path, model.student.backbone)
    item = lab.encode(model, samples[:1])[0]
    first = cache.features(item)
    (other,) = lab.encode(model, repaint(samples[:1], tmp_path))
    assert not torch.equal(cache.features(other), first)
    with torch.no_grad():
        next(model.student.backbone.family.vision_tower(model.student.model).parameters()).add_(0.1)
    assert not torch.equal(VisionCache(tmp_path, model.student.backbone).features(item), first)


def test_the_vision_cache_holds_no_more_than_it_may(lab: Any, samples: list[Sample], tmp_path: Path) -> None:
    model = lab.model()
    items = lab.encode(model, samples)
    free = [VisionCache(tmp_path, model.student.backbone).features(item) for item in items]
    room = free[0].nbytes
    cache = VisionCache(tmp_path, model.student.backbone, memory=room)
    for _ in range(2):
        for item, features in zip(items, free, strict=True):
            assert torch.equal(cache.features(item), features)
    assert sum(kept.nbytes for kept in cache._memory.values()) == room and len(free) > 1


def test_a_checkpoint_comes_back_bit_for_bit(lab: Any, samples: list[Sample], tmp_path: Path) -> None:
    student = lab.student(dtype="float32")
    model = lab.model(student=student)
    run(model, lab.batch(model, samples))["loss"].backward()
    torch.optim.AdamW([p for _, p in model.trainable_parameters()], lr=1e-2).step()
    model.save_checkpoint(tmp_path)
    fresh = lab.model(student=lab.student(dtype="float32"))
    fresh.load_checkpoint(tmp_path)
    for (name, one), (_, two) in zip(model.state_dict().items(), fresh.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    assert "laavit" not in (tmp_path / "config.json").read_text()


def test_a_checkpoint_of_another_model_is_refused(lab: Any, tmp_path: Path) -> None:
    lab.model().save_checkpoint(tmp_path)
    without = lab.model({})
    with pytest.raises(UserError, match="holds another model"):
        without.load_checkpoint(tmp_path)
    wide = lab.model({"concept": ConceptTarget(hidden=11), "trajectory": TrajectoryTarget()})
    with pytest.raises(UserError, match="holds another model"):
        wide.load_checkpoint(tmp_path)
    (tmp_path / "heads.safetensors").unlink()
    with pytest.raises(UserError, match=r"heads\.safetensors is missing"):
        lab.model().load_checkpoint(tmp_path)


def test_question_first_puts_the_question_before_the_image(lab: Any, samples: list[Sample]) -> None:
    model = lab.model({})
    for order, sign in (("image_first", 1), ("question_first", -1)):
        for item in lab.encode(model, samples, order):
            question = (item.roles == Role.QUESTION).nonzero().flatten()
            assert sign * (int(question[0]) - item.spans[0].start) > 0
            text = model.student.backbone.tokenizer.decode(item.input_ids[question])
            assert text.strip() == item.sample.question
    with pytest.raises(UserError, match="allowed: image_first, question_first"):
        PromptSettings(order="image-first")
