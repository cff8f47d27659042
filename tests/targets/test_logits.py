"""Logits distillation against Hinton's loss over the whole vocabulary, written out, in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from torch import Tensor

from laavit.cli import run
from laavit.registry import UserError
from laavit.structures import AnswerLogits, Encoded, Role, Sample, StudentOutput, Trace
from laavit.targets.base import stack
from laavit.targets.logits import LogitsTarget
from laavit.traces.store import TraceStore

VOCABULARY = 11
#: how many latents each sample's model writes itself, and its answer
BATCH = [(0, [3, 7, 1]), (2, [5, 1]), (1, [9, 0, 2, 1])]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def encoded(latents: int, answer: list[int], name: str = "s") -> Encoded:
    """``[other, header, latents..., separator, answer]``; latents and separator are labelled, too."""
    written = [*range(90, 90 + latents + 1)] if latents else []
    labels = torch.tensor([-100, *written, *answer, -100])
    roles = torch.full(labels.shape, int(Role.ANSWER), dtype=torch.uint8)
    roles[:2], roles[2 : 2 + latents] = Role.OTHER, Role.LATENT
    return Encoded(torch.zeros_like(labels), roles, labels, (), None, (0, 0), {}, Sample(name, (), "?", "!"))


def trace(answer: list[int], logits: Tensor, k: int, name: str = "s") -> Trace:
    """A trace of a teacher with these logits [M, V]."""
    logprobs, ids = logits.log_softmax(-1).topk(k)
    kept = AnswerLogits(torch.tensor(answer), ids, logprobs)
    return Trace(name, "", (), torch.zeros(0), torch.zeros(1), 0.0, logits=kept)


def loss(target: LogitsTarget, student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """The target's loss of ``BATCH``. student, teacher: [answer tokens of the batch, V]."""
    parts = teacher.split([len(answer) for _, answer in BATCH])
    items = [encoded(*each) for each in BATCH]
    pairs = zip(BATCH, items, parts, strict=True)
    prepared = stack([target.prepare(item, trace(answer, part, k)) for (_, answer), item, part in pairs])
    labels = torch.tensor([token for _, answer in BATCH for token in answer])
    return target(StudentOutput(torch.zeros(0), student, labels), torch.zeros(0), prepared)


def plain(direction: str, p: Tensor, q: Tensor) -> Tensor:
    """The divergence of two distributions, outcome by outcome."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return sum((x * (x / y).log() for x, y in zip(a, b, strict=True) if x > 0), torch.zeros((), dtype=a.dtype))

    if direction == "js":
        return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
    return kl(p, q) if direction == "forward" else kl(q, p)


def bucketed(logits: Tensor, ids: list[int], temperature: float) -> Tensor:
    """The probabilities of the tokens in ``ids`` and of all others together, raised to 1 / T and scaled to sum 1."""
    share = logits.softmax(-1)
    outside = [v for v in range(len(logits)) if v not in ids]
    parts = [share[v] for v in ids] + ([sum(share[v] for v in outside)] if outside else [])
    raised = torch.stack(parts) ** (1 / temperature)
    return raised / raised.sum()


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [VOCABULARY, 4, 1])
def test_values_and_gradients(direction: str, temperature: float, k: int) -> None:
    teacher = normal(9, VOCABULARY, seed=1)
    student = normal(9, VOCABULARY, seed=2).requires_grad_()
    found = loss(LogitsTarget(temperature=temperature, direction=direction), student, teacher, k)
    each = []
    for z_t, z_s in zip(teacher, student, strict=True):
        if k == VOCABULARY:  # Hinton's: softmax(z / T) on both sides
            p, q = (z_t / temperature).softmax(-1), (z_s / temperature).softmax(-1)
        else:
            ids = sorted(range(VOCABULARY), key=lambda v: -float(z_t[v]))[:k]
            p, q = bucketed(z_t, ids, temperature), bucketed(z_s, ids, temperature)
        each.append(plain(direction, p, q))
    expected = temperature**2 * sum(each) / len(each)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert found > 0.01
    gradients = [torch.autograd.grad(value, student)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)
    assert gradients[0].abs().sum(-1).min() > 0


def test_other_tokens_cost_the_student_something_where_the_teacher_has_none() -> None:
    """KL(student || teacher): a rest that rounding hides in the teacher is no place for the student to hide."""
    teacher = normal(9, VOCABULARY, seed=1) + 40.0 * torch.eye(VOCABULARY, dtype=torch.float64)[:9]
    student = teacher.clone().requires_grad_()
    wrong = (teacher + 60.0 * torch.eye(VOCABULARY, dtype=torch.float64)[-1]).requires_grad_()
    target = LogitsTarget(direction="reverse")
    good, bad = loss(target, student, teacher, 4), loss(target, wrong, teacher, 4)
    assert 0 <= good < 1e-4 and bad > 5
    (gradient,) = torch.autograd.grad(bad, wrong)
    assert (gradient[:, -1] > 0).all()  # the token that the teacher never says goes down


def test_the_scale_keeps_gradients_as_t_grows() -> None:
    """Hinton, Sec. 2: at high T the gradient is (z_s - z_t) / (V T^2) a token, so T^2 times it does not vanish."""
    teacher, student = normal(9, VOCABULARY, seed=1), normal(9, VOCABULARY, seed=2).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(LogitsTarget(temperature=1e4), student, teacher, VOCABULARY), student)
    own = student.detach()
    expected = ((own - own.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))) / VOCABULARY / 9
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_nothing_is_lost_where_student_and_teacher_agree() -> None:
    teacher = normal(9, VOCABULARY, seed=1)
    student = teacher + 5  # logits are free up to a constant
    for direction in ("forward", "reverse", "js"):
        for temperature in (1.0, 3.0):
            target = LogitsTarget(temperature=temperature, direction=direction)
            assert float(loss(target, student, teacher, 3)) == pytest.approx(0, abs=1e-12)


def test_tokens_that_the_student_does_not_have_are_of_the_rest() -> None:
    """Embedding tables of one tokenizer are padded to several lengths."""
    teacher, student = normal(9, VOCABULARY, seed=3), normal(9, VOCABULARY - 2, seed=4).requires_grad_()
    teacher[:4, -1] = teacher[:4].max(-1).values - 0.1  # kept, second to the most probable one
    found = loss(LogitsTarget(temperature=2.0), student, teacher, 4)
    each = []
    for z_t, z_s in zip(teacher, student, strict=True):
        ids = [v for v in sorted(range(VOCABULARY), key=lambda v: -float(z_t[v]))[:4] if v < VOCABULARY - 2]
        each.append(plain("forward", bucketed(z_t, ids, 2.0), bucketed(z_s, ids, 2.0)))
    expected = 4 * sum(each) / 9
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(value, student)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)
    assert torch.isfinite(loss(LogitsTarget(), student, teacher, VOCABULARY))  # where the student has no rest


def test_float32_traces_of_a_sure_teacher() -> None:
    """A rest that float32 cannot tell from nothing is nothing, at any temperature."""
    teacher = normal(9, VOCABULARY, seed=5)
    student = normal(9, VOCABULARY, seed=6)
    exact = loss(LogitsTarget(temperature=8.0), student, teacher, VOCABULARY)
    kept = trace([1] * 9, teacher, VOCABULARY).logits
    assert kept is not None
    prepared = LogitsTarget(temperature=8.0).prepare(
        encoded(0, [1] * 9), replace(trace([1] * 9, teacher, 1), logits=replace(kept, logprobs=kept.logprobs.float()))
    )
    output = StudentOutput(torch.zeros(0), student, torch.ones(9, dtype=torch.long))
    rounded = LogitsTarget(temperature=8.0)(output, torch.zeros(0), stack([prepared]))
    torch.testing.assert_close(rounded, exact, rtol=1e-5, atol=1e-6)


def test_the_control_moves_probabilities_among_the_kept_tokens() -> None:
    item, given = encoded(0, [1] * 9, "x"), trace([1] * 9, normal(9, VOCABULARY, seed=7), 6, "x")
    assert given.logits is not None
    first, again, other = (LogitsTarget(control="random", seed=s).prepare(item, given) for s in (0, 0, 1))
    assert torch.equal(first["logprobs"], again["logprobs"]) and not torch.equal(first["logprobs"], other["logprobs"])
    assert torch.equal(first["ids"], given.logits.ids) and torch.equal(first["tokens"], given.logits.tokens)
    assert torch.equal(first["logprobs"].sort(-1, descending=True).values, given.logits.logprobs)
    assert len({tuple(row.argsort().tolist()) for row in first["logprobs"]}) > 5  # an order for each token
    assert torch.equal(LogitsTarget().prepare(item, given)["logprobs"], given.logits.logprobs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"control": "shuffled"}, "control: got 'shuffled'; another sample's logits belong to another answer's tokens"),
        ({"control": "wrong_image"}, "control: got 'wrong_image'"),
        ({"control": "uniform"}, "even shares need no teacher; allowed: none, random"),
        ({"direction": "backward"}, "direction: got 'backward'; .*forward, js, reverse"),
        ({"temperature": 0.0}, "temperature is above 0"),
        ({"weight": -1.0}, "weight is not negative"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LogitsTarget(**arguments)


def test_traces_without_logits_and_other_tokens_are_refused() -> None:
    target = LogitsTarget()
    with pytest.raises(UserError, match=r"needs traces: give traces.path"):
        target.setup(32, 3, 0, {})
    with pytest.raises(UserError, match=r"hold no answer logits; extract with extract.logits"):
        target.setup(32, 3, 0, {"settings": {"rows": ["answer"]}})
    target.setup(32, 3, 0, {"settings": {"logits": 4}})
    for answer in ([3, 8, 1], [3, 1], [9, 3, 7, 1]):
        with pytest.raises(UserError, match=r"sample 's' is the tokens \[.*\] for the student.* one tokenizer"):
            target.prepare(encoded(0, [3, 7, 1]), trace(answer, normal(len(answer), VOCABULARY, seed=0), 2))


def test_labels_of_another_batch_are_no_silent_matter() -> None:
    target, teacher = LogitsTarget(), normal(3, VOCABULARY, seed=0)
    prepared = stack([target.prepare(encoded(0, [3, 7, 1]), trace([3, 7, 1], teacher, 2))])
    with pytest.raises(ValueError, match="are not the tokens"):
        target(StudentOutput(torch.zeros(0), teacher, torch.tensor([3, 1, 7])), torch.zeros(0), prepared)


# --- from an extraction to a step -------------------------------------------------------------------------------------

PLAIN = ["--latents", "null", "--gate", "null", "--targets.concept", "null", "--targets.trajectory", "null"]
OWN = ["--extract.answer", "teacher", "--extract.max_new_tokens", "3"]
KD = [*PLAIN, "--filters", "null", "--extract.system", "You look closely.", "--targets.kd", "logits_kd"]


def trained(recipe: Path, *flags: str) -> list[dict[str, float]]:
    """Extract, then train three steps; the log's entries."""
    folder = recipe.parent / "run"
    assert run("extract", [str(recipe), *flags]) == 0
    assert run("train", [str(recipe), *flags, "--work-dir", str(folder)]) == 0
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "ntp" in entry]


def test_a_teacher_of_its_own_has_nothing_to_teach(own_project: Path) -> None:
    """Student and teacher are one model and read one prompt: the first loss is zero, whoever's answer is recorded."""
    log = trained(own_project, *KD, "--extract.logits", "8", *OWN, "--train.lr", "0.01")
    assert log[0]["kd"] == pytest.approx(0, abs=1e-5) and log[0]["ntp"] > 1
    assert log[-1]["kd"] > 1e-3  # it has learned something else since


def test_a_student_learns_its_teachers_probabilities(own_project: Path, write_tiny: Callable[..., Path]) -> None:
    """Zero latents, a frozen tower, L_ntp and the target; and the same with the target's own store."""
    teacher = str(write_tiny(own_project.parent / "teacher", seed=7))
    flags = ["--teacher.path", teacher, "--extract.logits", "16", "--train.steps", "8", "--train.lr", "0.01"]
    log = trained(own_project, *KD, *flags, "--targets.kd.weight", "20")
    assert all(math.isfinite(entry["kd"]) for entry in log)
    assert log[-1]["kd"] < 0.8 * log[0]["kd"] and log[0]["kd"] > 0.1
    held = TraceStore(own_project.parent / "traces")
    assert all(trace.logits is not None and trace.logits.ids.shape[1] == 16 for trace in held)

    rest = [*KD, *flags, "--train.steps", "1", "--traces.path", str(own_project.parent / "none")]
    words = [*rest, "--targets.kd.store", str(held.path), "--work-dir", str(own_project.parent / "second")]
    assert run("train", [str(own_project), *words, "--traces.path", "null"]) == 0


def test_beside_latents_and_the_other_targets(own_project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Latents that the student writes itself, whose labels are no words; the plan steps through the same on shapes."""
    flags = ["--extract.logits", "4", "--targets.kd", "logits_kd_js", "--targets.random", "logits_kd_random"]
    flags += ["--latents", "emitted"]
    assert run("plan", [str(own_project), *flags]) == 0
    assert "losses: ntp, emit, concept, trajectory, kd, random" in " ".join(capsys.readouterr().out.split())
    log = trained(own_project, *flags)
    figures = torch.tensor([[entry[name] for name in ("kd", "random", "concept", "trajectory")] for entry in log])
    assert len(figures) and torch.isfinite(figures).all() and (figures > 0).all()


def test_another_tokenizer_is_refused_before_the_first_step(
    own_project: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = str(tiny("internvl", tmp_path_factory.mktemp("internvl")))
    flags = [str(own_project), *KD, "--teacher.path", teacher, "--extract.logits", "4"]
    assert run("extract", flags) == 0
    assert run("train", [*flags, "--work-dir", str(own_project.parent / "run")]) == 2
    assert "logits can be distilled between models of one tokenizer" in capsys.readouterr().err


def test_a_recipe_without_logits_is_refused(own_project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the extraction, and with a store that is there already, before the first step."""
    kept = str(own_project.parent / "kept")
    assert run("extract", [str(own_project), "--traces.path", kept]) == 0
    capsys.readouterr()
    assert run("extract", [str(own_project), *KD]) == 2
    assert "targets.kd: these traces hold no answer logits" in capsys.readouterr().err
    words = [str(own_project), *KD, "--traces.path", kept, "--work-dir", str(own_project.parent / "run")]
    assert run("train", words) == 2
    assert "targets.kd: these traces hold no answer logits" in capsys.readouterr().err
