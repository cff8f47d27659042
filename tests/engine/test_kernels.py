"""Every faster way computes the same step: gradients under gate, probe and targets; and what is refused."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from processes import launch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor import cpp_builder

from laavit.backbones.base import collate
from laavit.cross_entropy import next_token_loss, part_by_part
from laavit.engine import kernels
from laavit.engine.kernels import use_kernels
from laavit.engine.settings import TrainSettings
from laavit.engine.strategies import Single
from laavit.gates import ConstantGate
from laavit.model import LaViT
from laavit.registry import UserError
from laavit.structures import Batch, Sample
from laavit.students import HFStudent
from laavit.targets import ConceptTarget, LogitsTarget, TrajectoryTarget

CPU = torch.device("cpu")


@pytest.fixture
def model(whole_lab: Any) -> LaViT:
    """Gate half open, the rows of latents recorded, concept and trajectory on; float32."""
    targets = {"concept": ConceptTarget(), "trajectory": TrajectoryTarget()}
    made: LaViT = whole_lab.model(targets, ConstantGate(0.3), whole_lab.student(dtype="float32"))
    return made


def batches(lab: Any, model: LaViT, samples: list[Sample]) -> list[Batch]:
    """Unequal images, two of one sample among them: padded; with shared beginnings, so of other lengths; shorter."""
    asked = [*samples, Sample("d", samples[1].images, "What colour?", "red", samples[1].boxes)]
    padded, other = lab.batch(model, asked), lab.batch(model, samples[:2])
    backbone = model.student.backbone
    shared = collate(lab.encode(model, asked), backbone.family, backbone.tokenizer.pad_token_id, share=True)
    assert shared.shared is not None
    shared.targets = padded.targets
    for batch in (padded, other):
        for prepared in batch.targets.values():
            prepared.update({name: t.float() if t.is_floating_point() else t for name, t in prepared.items()})
    return [padded, shared, other]


def step(model: LaViT, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    losses = model(batch)
    losses["loss"].backward()
    grads = {name: p.grad.clone() for name, p in model.trainable_parameters() if p.grad is not None}
    return grads | {f"loss {name}": value.detach() for name, value in losses.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], most: float = 1e-5) -> None:
    """The whole gradient within a share of its norm; each parameter's within ten times that share of its own.

    What a key's bias gets is a difference of large sums: float32 leaves it a digit less.
    """
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    off = {name: (found[name] - gradient).norm() for name, gradient in expected.items()}
    assert torch.stack(list(off.values())).norm() <= most * whole
    for name, gradient in expected.items():
        assert off[name] <= 10 * most * max(gradient.norm(), 1e-3 * whole), name


def compiled(model: LaViT, **more: Any) -> None:
    torch._dynamo.reset()
    Single().wrap(model, TrainSettings(compile=True, **more), CPU)


WAYS: dict[str, Callable[[LaViT], None]] = {
    "compiled": compiled,
    "chunked": lambda model: use_kernels(model, TrainSettings(loss_rows=3), CPU),
    "compiled, checkpointed": partial(compiled, gradient_checkpointing=True),
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow) if "checkpointed" in way else way for way in WAYS]
)
def test_the_gradients_are_the_same(
    way: str, model: LaViT, whole_lab: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where 'aot_eager' stands for the compiler: dynamo's graphs and autograd's without Triton or C++."""
    monkeypatch.setattr(kernels, "BACKEND", "aot_eager")
    fast = copy.deepcopy(model)
    WAYS[way](fast)
    for batch in batches(whole_lab, model, samples)[: 3 if "checkpointed" in way else 2]:
        same(step(fast, batch), step(model, batch))
    assert list(fast.state_dict()) == list(model.state_dict()), "no name changes"


@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_code_serves_all_blocks(
    checkpointed: bool, model: LaViT, whole_lab: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither depth, nor what is recorded where, nor the gate's value compiles a block anew; lengths do it once.

    What a checkpoint runs again in the backward pass is that code, too.
    """
    graphs: list[int] = []
    calls: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return lambda *args: calls.append(1) or graph.forward(*args)  # type: ignore[func-returns-value]

    monkeypatch.setattr(kernels, "BACKEND", counting)
    assert len(kernels.decoder_blocks(model)) == 3
    compiled(model, gradient_checkpointing=checkpointed)
    counts = []
    for value, batch in zip((0.3, 0.3, 0.7, 0.7), [*batches(whole_lab, model, samples)[::2]] * 2, strict=True):
        model.gate = ConstantGate(value)
        calls.clear()
        loss = model(batch)["loss"]
        forward = len(calls)
        loss.backward()
        counts.append(len(graphs))
        assert forward >= 3 and len(calls) == forward * (1 + checkpointed), "once, and once more where checkpointed"
    assert counts[3] == counts[2] == counts[1] <= 2 * counts[0], counts


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler on the CPU")
@pytest.mark.parametrize("way", ["compiled", "compiled, checkpointed"])
def test_what_inductor_compiles_has_the_same_gradients(
    way: str, model: LaViT, whole_lab: Any, samples: list[Sample]
) -> None:
    """In a process of its own: the compiler starts threads, after which no other test could fork."""

    def work(rank: int) -> None:
        inductor_config.compile_threads = 1
        fast = copy.deepcopy(model)
        WAYS[way](fast)
        for batch in batches(whole_lab, model, samples)[:2]:
            same(step(fast, batch), step(model, batch))
        assert torch._dynamo.utils.counters["inductor"], "it did compile"

    assert launch(work, 1) == [0]


def test_no_compiler_is_said_before_the_first_step(model: LaViT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_builder.config.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(UserError, match=r"train\.compile: there is no C\+\+ compiler"):
        use_kernels(model, TrainSettings(compile=True), CPU)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 11, 50])
def test_the_loss_part_by_part_is_the_loss(rows: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 21, bias=False, dtype=torch.float64)
    states = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(21, (11,))
    expected = torch.autograd.grad(next_token_loss(head(states), labels), (states, head.weight))
    loss = part_by_part(states, labels, head, rows)
    torch.testing.assert_close(loss, next_token_loss(head(states), labels), rtol=1e-14, atol=0)
    for ours, gradient in zip(torch.autograd.grad(loss, (states, head.weight)), expected, strict=True):
        torch.testing.assert_close(ours, gradient, rtol=1e-12, atol=1e-15)


def test_no_more_logits_than_asked_for_are_there_at_once() -> None:
    seen: list[int] = []
    head = nn.Linear(8, 21)
    head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    part_by_part(torch.randn(11, 8, requires_grad=True), torch.randint(21, (11,)), head, 4).backward()
    assert sorted(seen) == [3, 3, 4, 4, 4, 4], "once forward, once backward"


def test_written_latents_are_read_part_by_part_too(whole_lab: Any, samples: list[Sample]) -> None:
    model = whole_lab.model({}, student=whole_lab.student(emitted=True))
    fast = copy.deepcopy(model)
    fast.token_loss = partial(part_by_part, rows=2)
    batch = whole_lab.batch(model, samples)
    found, expected = step(fast, batch), step(model, batch)
    assert "loss emit" in found
    same(found, expected, 1e-9)


def test_a_target_that_reads_logits_is_refused(whole_lab: Any) -> None:
    model = LaViT(whole_lab.student(), targets={"words": LogitsTarget()})
    with pytest.raises(UserError, match=r"train\.loss_rows: the target 'words' reads all logits at once"):
        use_kernels(model, TrainSettings(loss_rows=8), CPU)


# --- Liger ------------------------------------------------------------------------------------------------------------


def installed(monkeypatch: pytest.MonkeyPatch, known: tuple[str, ...]) -> list[dict[str, Any]]:
    """A liger-kernel that notes what it is asked for."""
    calls: list[dict[str, Any]] = []
    package, inner, patch = (ModuleType(name) for name in ("liger_kernel", "transformers", "monkey_patch"))
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = dict.fromkeys(known)  # type: ignore[attr-defined]
    patch._apply_liger_kernel_to_instance = lambda **given: calls.append(given)  # type: ignore[attr-defined]
    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch")
    for name, module in zip(names, (package, inner, patch), strict=True):
        module.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_liger_is_asked_for_all_but_the_loss(monkeypatch: pytest.MonkeyPatch, model: LaViT) -> None:
    calls, settings = installed(monkeypatch, ("qwen2_5_vl",)), TrainSettings(kernels="liger")
    with pytest.raises(UserError, match="needs a GPU, and this run is on cpu"):
        use_kernels(model, settings, CPU)
    use_kernels(model, settings, torch.device("cuda", 0))
    (call,) = calls
    assert call.pop("model") is model.student.backbone.model and not any(call.values())
    assert model.token_loss is kernels.liger_loss


def test_liger_that_is_not_there_or_knows_no_such_model(monkeypatch: pytest.MonkeyPatch, model: LaViT) -> None:
    settings, gpu = TrainSettings(kernels="liger"), torch.device("cuda", 0)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        use_kernels(model, settings, gpu)
    monkeypatch.undo()
    installed(monkeypatch, ("qwen2_vl",))
    with pytest.raises(UserError, match=r"no kernels for 'qwen2_5_vl'.*did you mean 'qwen2_vl'"):
        use_kernels(model, settings, gpu)


def test_names_are_checked() -> None:
    with pytest.raises(UserError, match=r"train\.kernels: got 'ligr'; allowed: liger, none \(did you mean 'liger'"):
        TrainSettings(kernels="ligr")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="neither add a gate's bias to scores nor give the rows"):
        HFStudent("nowhere", attention="flash_attention_2")


def test_nothing_asked_for_is_nothing_done() -> None:
    use_kernels(SimpleNamespace(), TrainSettings(), CPU)
