"""With the tiny Qwen2.5-VL: what each target asks of the student, and which ask nothing."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from laavit.engine import normalisation
from laavit.engine.hooks import target_gradients
from laavit.engine.hooks.gradient_norms import GradientNormHook, named_parts
from laavit.engine.hooks.target_gradients import PATIENCE, TargetGradientHook
from laavit.engine.settings import TrainSettings
from laavit.latents import latent_tokens
from laavit.targets import ConceptTarget, TrajectoryTarget

SETTINGS = TrainSettings(steps=9, log_every=1, device="cpu")


def step(hook, model, batch, number=0, backward=True):
    """One step as the loop calls its hooks; returns the figures."""
    runner = SimpleNamespace(model=model, iter=number)
    hook.before_train(runner)
    hook.before_train_iter(runner, number)
    outputs = model(batch, mode="loss")
    if backward:
        model.zero_grad(set_to_none=True)
        outputs["loss"].backward()
    return outputs, figures_of(hook, runner, number)


def figures_of(hook, runner, number=0):
    """What the hook adds to the log of a single process."""
    figures = {}
    hook.after_train_iter(runner, number, outputs=figures)
    figures = {name: float(value) for name, value in figures.items()}
    hook.before_log(runner, figures)
    return figures


def test_norms_are_those_of_the_weighted_loss_at_the_students_states_and_rows(lab, samples):
    model = lab.model({"concept": ConceptTarget(0.3), "trajectory": TrajectoryTarget(0.7)})
    batch = lab.batch(model, samples)
    _, found = step(TargetGradientHook(SETTINGS), model, batch)
    assert set(found) == {"target_grad/concept", "target_grad/trajectory"}
    output = model.observe(batch)
    loss = 0.7 * model.targets["trajectory"](output, batch.roles, batch.targets["trajectory"])
    gradients = torch.autograd.grad(loss, list(output.rows.values()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert found["target_grad/trajectory"] == pytest.approx(float(norm), rel=1e-5)  # the hook's norms are float32
    output = model.observe(batch)
    loss = 0.3 * model.targets["concept"](output, batch.roles, batch.targets["concept"])
    norm = torch.autograd.grad(loss, output.hidden)[0].norm()
    assert found["target_grad/concept"] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_norms_are_the_same_however_a_step_is_split(lab, samples, monkeypatch, world):
    model = lab.model({"concept": ConceptTarget(0.3), "trajectory": TrajectoryTarget(0.7)})
    samples = [*samples, *samples][:3]
    _, whole = step(TargetGradientHook(SETTINGS), model, lab.batch(model, samples))
    parts = [{"batch": lab.batch(model, some)} for some in (samples[:1], samples[1:])]
    normalisation.add_shares(model, parts, torch.device("cpu"))  # as one process would give, for two micro-batches
    monkeypatch.setattr(target_gradients, "rank_and_world", lambda: (0, world))
    runner = SimpleNamespace(model=model, iter=0)
    squares = []
    for each in (parts,) if world == 1 else [[part] for part in parts]:
        hook = TargetGradientHook(replace(SETTINGS, accumulate=len(each)))
        hook.before_train(runner)
        hook.before_train_iter(runner, 0)
        for part in each:
            hook.before_micro_batch(runner, part)
            model(**part)
        outputs = {}
        hook.after_train_iter(runner, 0, outputs=outputs)
        squares.append(outputs)
    means = {name: float(sum(each[name] for each in squares)) / world for name in squares[0]}
    hook.before_log(runner, means)
    assert means == pytest.approx(whole, rel=1e-5)


def test_the_step_has_the_same_bits_with_it_and_without(lab, samples):
    found = []
    for watched in (True, False):
        model = lab.model()
        batch = lab.batch(model, samples)
        hook = TargetGradientHook(SETTINGS)
        torch.manual_seed(0)
        if watched:
            outputs, _ = step(hook, model, batch)
        else:
            outputs = model(batch, mode="loss")
            outputs["loss"].backward()
        drawn = torch.rand(1)
        found.append([outputs["loss"], drawn, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert not any(target._forward_pre_hooks for target in model.targets.values())
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def speak(hook, model, batch, caplog):
    """What the hook says in as many logged steps as it needs, and one more."""
    runner = SimpleNamespace(model=model, iter=0)
    for number in range(PATIENCE + 1):
        outputs, figures = step(hook, model, batch, number, backward=False)
        losses = {name: float(value.detach()) for name, value in outputs.items()}
        hook.after_log(runner, {"iter": number + 1, **losses, **figures})
    return [record.getMessage() for record in caplog.records if "is dead" in record.getMessage()]


def test_a_dead_target_is_told_once_with_its_cause(lab, samples, caplog):
    model = lab.model()
    batch = lab.batch(model, samples)
    assert speak(TargetGradientHook(SETTINGS), model, batch, caplog) == []
    # A part of the model's own that cuts the graph of what the trajectory reads.
    cut = model.targets["trajectory"].own_rows
    model.targets["trajectory"].own_rows = lambda output, layers: (
        cut(output, layers)[0].detach(),
        cut(output, layers)[1],
    )
    told = speak(TargetGradientHook(SETTINGS), model, batch, caplog)
    assert len(told) == 1 and "'trajectory'" in told[0] and "cuts the graph" in told[0] and "step 3:" in told[0]


def test_a_loss_that_is_not_finite_is_no_dead_target(lab, samples, caplog):
    hook = TargetGradientHook(SETTINGS)
    hook.targets = lab.model({"trajectory": TrajectoryTarget()}).named_targets
    for number, loss in enumerate([1.0, 1.0, None, None, None, 1.0]):
        assert "is dead" not in caplog.text
        hook.after_log(None, {"iter": number + 1, "trajectory": loss, "target_grad/trajectory": 0.0})
    assert "step 6: the target 'trajectory' is dead" in caplog.text


def test_causes_are_told_apart(lab, samples, caplog):
    zero = lab.model({"concept": ConceptTarget(0.0)})
    [told] = speak(TargetGradientHook(SETTINGS), zero, lab.batch(zero, samples), caplog)
    assert "its weight is 0 (targets.concept.weight)" in told
    caplog.clear()
    frozen = lab.model({"concept": ConceptTarget()})
    frozen.student.requires_grad_(False)
    [told] = speak(TargetGradientHook(SETTINGS), frozen, lab.batch(frozen, samples), caplog)
    assert "everything below is frozen" in told
    caplog.clear()
    empty = lab.model({"trajectory": TrajectoryTarget()})
    batch = lab.batch(empty, samples)
    batch.targets["trajectory"]["gaze"].zero_()  # no row has a map to follow
    [told] = speak(TargetGradientHook(SETTINGS), empty, batch, caplog)
    assert "no sample of these batches has what it speaks of" in told


def test_gradient_norms_by_part_add_up_to_the_whole(lab, samples):
    model = lab.model(student=lab.student(freeze=()))
    parts = named_parts(model)
    assert set(parts) == {"embeddings", "vision", "decoder", "projector", "targets"}
    every = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, every)) == sorted(id(p) for some in parts.values() for p in some)
    model(lab.batch(model, samples), mode="loss")["loss"].backward()
    hook, runner = GradientNormHook(SETTINGS), SimpleNamespace(model=model, iter=0)
    hook.before_train(runner)
    hook.before_update(runner)
    figures = {}
    hook.after_train_iter(runner, 0, outputs=figures)
    rows = float(figures.pop("grad_norm/new_rows"))
    total = torch.stack([p.grad.norm() for p in every if p.grad is not None]).norm()
    assert torch.stack([torch.as_tensor(v) for v in figures.values()]).norm() == pytest.approx(float(total), rel=1e-9)
    table = model.student.backbone.model.get_input_embeddings().weight
    ids = model.student.backbone.tokenizer.convert_tokens_to_ids(latent_tokens(4))
    assert rows == pytest.approx(float(table.grad[ids].norm()), rel=1e-9) and 0 < rows < float(
        figures["grad_norm/embeddings"]
    )
