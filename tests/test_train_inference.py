"""Train = inference, for every mode of latents: what teacher forcing predicts is what generation writes.

A tiny student learns two answers by heart, so that greedy generation has something to say; then the training code
(with gradient checkpointing, too), ``Backbone.generate``, an export's evaluation and stock transformers must agree.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from laavit.backbones import PromptSettings, collate
from laavit.commands.export import exported_template
from laavit.engine.strategies import enable_gradient_checkpointing
from laavit.evaluation.bridge import Laavit, Settings
from laavit.gates import ConstantGate
from laavit.images import open_image
from laavit.latents import LearnedLatents, latent_tokens
from laavit.model import LaViT
from laavit.structures import Batch, Encoded, Sample
from laavit.students import HFStudent

SYSTEM, BUDGET = "You look closely.", 8


@dataclass(frozen=True)
class Mode:
    """A way to have latents. stock: whether stock transformers runs its export."""

    build: Callable[[], Any]
    stock: bool = True


MODES = {
    "forced": Mode(LearnedLatents),
    "varying": Mode(lambda: LearnedLatents((1, 4), seed=1)),
    "emitted": Mode(lambda: LearnedLatents(3, "random", emitted=True)),
}


def student_of(folder: Path, mode: Mode) -> HFStudent:
    student = HFStudent(str(folder), "float64")
    student.setup(mode.build(), torch.Generator().manual_seed(3))
    return student


@dataclass
class Learned:
    """A model that knows its samples' answers by heart."""

    mode: Mode
    model: LaViT
    samples: list[Sample]

    @property
    def backbone(self) -> Any:
        return self.model.student.backbone

    def prompts(self) -> list[Encoded]:
        builder = self.model.student.builder(PromptSettings(SYSTEM))
        return [builder.prompt_of(sample) for sample in self.samples]

    def batch(self, answers: list[str] | None = None) -> Batch:
        builder = self.model.student.builder(PromptSettings(SYSTEM))
        answers = answers or [sample.answer for sample in self.samples]
        items = [builder.encode(sample, answer) for sample, answer in zip(self.samples, answers, strict=True)]
        return collate(items, self.backbone.family, self.backbone.tokenizer.pad_token_id)

    def learn(self, steps: int = 250) -> None:
        """Until every token is the likeliest of its position by far; the frozen tower runs once."""
        batch, family = self.batch(), self.backbone.family
        with torch.no_grad():
            features = [own.detach() for own in family.image_features(self.backbone.model, batch.vision)]
        rest = {key: value for key, value in batch.vision.items() if not key.startswith("pixel_")}
        batch = replace(batch, features=features, vision=rest)
        optimizer = torch.optim.AdamW((p for _, p in self.model.trainable_parameters()), lr=2e-2)
        for _ in range(steps):
            losses = self.model(batch)
            if max(losses.values()) < 0.1:
                return
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
        raise AssertionError(f"the student did not learn two answers: {losses}")


@pytest.fixture(scope="module", params=MODES)
def learned(request: pytest.FixtureRequest, tiny_folder: Path, samples: list[Sample]) -> Learned:
    mode = MODES[request.param]
    found = Learned(mode, LaViT(student_of(tiny_folder, mode)).train(), samples[:2])
    found.learn()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_generation_writes_what_teacher_forcing_predicts(learned: Learned, checkpointing: bool) -> None:
    """Every label is its position's argmax, emitted latents too, and greedy generation says the gold answers."""
    learned = replace(learned, model=copy.deepcopy(learned.model))
    if checkpointing:
        enable_gradient_checkpointing(learned.model)
    output = learned.model.observe(learned.batch())
    assert torch.equal(output.logits.argmax(-1), output.labels)
    if learned.model.student.layout.emitted:
        assert output.emitted is not None and torch.equal(output.emitted[0].argmax(-1), output.emitted[1])
    learned.model.eval()  # in training mode checkpointing would take the cache away
    answers = learned.backbone.generate(learned.prompts(), BUDGET)
    assert answers == [sample.answer for sample in learned.samples] and len(set(answers)) == 2


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_the_logits_after_a_prompt(learned: Learned, dtype: str, tolerance: float) -> None:
    """Of the training code on prompt and answer, right-padded, and of generation on the prompt, left-padded."""
    twin = replace(learned, model=copy.deepcopy(learned.model).to(getattr(torch, dtype)))
    with torch.no_grad():
        hidden, prompts = twin.model.student(twin.batch()), twin.prompts()
        wanted = torch.stack([twin.backbone.logits(hidden[b, len(p.input_ids) - 1]) for b, p in enumerate(prompts)])
    seen: list[Tensor] = []  # what the head gives: transformers rounds logits that it returns to float32
    twin.backbone.model.get_output_embeddings().register_forward_hook(lambda _, inputs, logits: seen.append(logits))
    twin.model.eval()
    twin.backbone.generate(prompts, 1)
    assert (seen[0][:, -1] - wanted).abs().max() <= tolerance * wanted.abs().max()


def write_export(learned: Learned, folder: Path) -> Path:
    """The student's folder as ``laavit export`` writes it."""
    layout = learned.model.student.layout
    learned.backbone.save(folder)
    template = folder / "chat_template.jinja"
    written = 0 if layout.emitted else layout.most
    template.write_text(exported_template(template.read_text(encoding="utf-8"), SYSTEM, written), encoding="utf-8")
    card = {"latents": layout.most, "layout": asdict(layout), "system": SYSTEM}
    (folder / "laavit.json").write_text(json.dumps(card), encoding="utf-8")
    return folder


def chat(sample: Sample) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": open_image(path)} for path in sample.images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": sample.question}]}]


def test_an_export_says_the_same(learned: Learned, tmp_path: Path) -> None:
    """Through the evaluation, with each sample's number of latents; written ones are counted, not read as words."""
    folder, layout = write_export(learned, tmp_path / "export"), learned.model.student.layout
    for sample in learned.samples:
        count = layout.count_of(sample.id)
        model = Laavit(str(folder), latents=count if layout.varies else "on")
        [(answer, written)] = model.answer_and_count([chat(sample)], Settings(BUDGET, ()))
        assert answer.text == sample.answer and written == (count if layout.emitted else 0)
        tokens = len(model.tokenizer.encode(sample.answer))
        [answer] = model.answer([chat(sample)], Settings(tokens, ()))
        assert answer.text == sample.answer  # latents take none of the answer's tokens
        [answer] = model.answer([chat(sample)], Settings(tokens - 1, ()))
        assert answer.text == model.tokenizer.decode(model.tokenizer.encode(sample.answer)[:-1])


def test_stock_transformers_says_the_same(learned: Learned, tmp_path: Path) -> None:
    """Latents and separator are in its prompt, or it writes them before the answer: the same tokens either way."""
    if not learned.mode.stock:
        pytest.skip("an export of this mode is not run by stock transformers")
    folder, layout = write_export(learned, tmp_path / "export"), learned.model.student.layout
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float64").eval()
    processor = AutoProcessor.from_pretrained(folder)
    for prompt, sample in zip(learned.prompts(), learned.samples, strict=True):
        text = processor.apply_chat_template(chat(sample), add_generation_prompt=True, tokenize=False)
        own = "".join(latent_tokens(layout.count_of(sample.id)))
        if layout.varies:  # the template writes the most
            text = text.removesuffix("".join(latent_tokens(layout.most))) + own
        inputs = processor(text=[text], images=[[open_image(path) for path in sample.images]], return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == prompt.input_ids.tolist()
        out = model.generate(**inputs, max_new_tokens=BUDGET + 5, do_sample=False)[0, len(prompt.input_ids) :]
        assert processor.decode(out) == f"{own if layout.emitted else ''}{sample.answer}<|im_end|>"


@pytest.mark.parametrize("name", MODES)
def test_checkpointing_changes_neither_loss_nor_gradient(
    lab: Any, tiny_folder: Path, samples: list[Sample], name: str
) -> None:
    """With the gate half open, and targets on states and rows."""
    found = []
    for checkpointing in (False, True):
        model = lab.model(gate=ConstantGate(0.3), student=student_of(tiny_folder, MODES[name]))
        if checkpointing:
            enable_gradient_checkpointing(model)
        losses = model(lab.batch(model, samples[:2]))
        losses["loss"].backward()
        found.append((losses, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
    (plain, gradients), (kept, others) = found
    assert plain.keys() == kept.keys() and gradients.keys() == others.keys() and len(gradients) > 20
    for key, value in plain.items():
        torch.testing.assert_close(value, kept[key], rtol=1e-12, atol=1e-12)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[key], rtol=1e-9, atol=1e-12)
