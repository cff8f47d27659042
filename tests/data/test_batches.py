"""However a step's samples are put into batches, its gradient is the same: split, packed, bucketed, shared."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from safetensors.torch import load_file, save_file
from torch import Tensor

from laavit.backbones import PromptSettings
from laavit.backbones.rows import emits
from laavit.cli import run as cli_run
from laavit.data.aligned import Collate
from laavit.engine import TrainSettings, train
from laavit.gates import ConstantGate
from laavit.latents import LearnedLatents
from laavit.model import LaViT
from laavit.structures import AnswerLogits, Box, Encoded, Sample, Trace
from laavit.students import HFStudent
from laavit.targets import BoxTarget, ConceptTarget, LogitsTarget, RegionTarget, Target, TrajectoryTarget

HEADER = {"width": 24, "settings": {"logits": 4, "normalisation": "none"}}
WORDS = [
    ("what colour?", "red"),
    ("is the circle left of it?", "yes it is, left of the red circle"),
    ("how many?", "no"),
]


class FirstAnswerWord(Target):
    """A target of a user's own that knows nothing of counts: a mean over samples."""

    needs_trace = False

    def prepare(self, encoded: Encoded, trace: Trace | None) -> dict[str, Tensor]:
        return {"none": torch.zeros(1)}

    def forward(self, output: Any, roles: Tensor, prepared: Any) -> Tensor:
        return torch.stack([row[role == 4].square().mean() for row, role in zip(output.hidden, roles)]).mean()


def all_targets() -> dict[str, Target]:
    return {
        "concept": ConceptTarget(),
        "trajectory": TrajectoryTarget(rows=("latents", "predicting", "question")),
        "box": BoxTarget(layers=(-1,)),
        "region": RegionTarget(),
        "logits": LogitsTarget(),
        "own": FirstAnswerWord(0.01),
    }


class Items(list[Any]):
    """Encoded samples with what the targets prepared, as the data set gives them."""

    groups: list[Any]

    def lengths(self, places: Sequence[int]) -> np.ndarray:
        stops = [max(span.end for span in self[place][0].spans) for place in places]
        whole = [len(self[place][0].input_ids) for place in places]
        return np.array([[stop, length - stop] for stop, length in zip(stops, whole)])


@pytest.fixture(scope="module")
def asked(samples: list[Sample]) -> list[Sample]:
    """Three questions about each sample's images, with answers of 1 to 30 tokens; one sample has two images."""
    return [
        replace(sample, id=f"{sample.id}-{number}", question=question, answer=answer, boxes=(Box(0.1, 0.2, 0.6, 0.9),))
        for number, (question, answer) in enumerate(WORDS)
        for sample in samples
    ]


def model_of(folder: Path, latents: Any) -> LaViT:
    student = HFStudent(str(folder), "float32", freeze=())
    student.setup(latents, torch.Generator().manual_seed(3))
    targets = all_targets()
    torch.manual_seed(5)
    for target in targets.values():
        target.setup(student.backbone.width, student.backbone.depth, student.latents, HEADER)
    gate = ConstantGate(0.3, ("answer->image", "question->image"), layers="last 2")
    return LaViT(student, gate, targets).train()


def items_of(model: LaViT, samples: Sequence[Sample], lab: Any) -> Items:
    builder, found = model.student.builder(PromptSettings(system="Look.")), Items()
    for sample in samples:
        encoded = builder.encode(sample, sample.answer)
        words = encoded.labels[(encoded.labels >= 0) & ~emits(encoded.roles)]
        logprobs = torch.full((len(words), 4), 0.2).log()
        logits = AnswerLogits(words, torch.arange(4).expand(len(words), 4), logprobs)
        trace = replace(lab.trace(sample), logits=logits)
        found.append((encoded, {n: t.prepare(encoded, trace) for n, t in model.named_targets.items()}))
    found.groups = [sample.images for sample in samples]
    return found


class Gradients(Hook):
    """Keeps a step's gradient: AdamW's first moment after one step is a tenth of it."""

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        model = runner.model.module if hasattr(runner.model, "module") else runner.model
        state = runner.optim_wrapper.optimizer.state
        self.found = {n: state[p]["exp_avg"] * 10 for n, p in model.named_parameters() if p in state}


def step(model: LaViT, items: Items, folder: Path, collate: dict[str, Any] | None = None, **settings: Any) -> Any:
    """The gradient and the logged figures of one step over all items."""
    family, pad = model.student.backbone.family, model.student.backbone.tokenizer.pad_token_id
    given = {"batch_size": len(items), "lr": 0.0, "clip_grad": 0.0, "threads": 1, "device": "cpu", **settings}
    made = TrainSettings(**{"steps": 1, "warmup_ratio": 0.0, "tensorboard": False, **given})
    hook = Gradients()
    train(model, items, Collate(family, pad, **(collate or {})), made, folder, {}, hooks=[hook])  # type: ignore[arg-type]
    line = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    return SimpleNamespace(grads=hook.found, log=line)


def assert_same(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Gradients, in their norm and parameter by parameter, and every logged loss."""
    assert found.grads.keys() == expected.grads.keys()
    whole = torch.stack([g.norm() for g in expected.grads.values()]).norm()
    apart = {name: (found.grads[name] - grad).norm() for name, grad in expected.grads.items()}
    assert torch.stack(list(apart.values())).norm() <= rtol * whole
    for name, grad in expected.grads.items():
        assert apart[name] <= rtol * grad.norm().clamp(min=1e-2 * whole), name
    for name in ("loss", "ntp", *all_targets()):
        assert found.log[name] == pytest.approx(expected.log[name], rel=1e-5), name


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, asked: list[Sample], lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Model, items, and their step as one padded batch."""
    model = model_of(tiny_folder, LearnedLatents((2, 4), noise=0.5, seed=1))
    items = items_of(model, asked, lab)
    return SimpleNamespace(model=model, items=items, step=step(model, items, tmp_path_factory.mktemp("whole")))


def test_accumulation_changes_no_gradient(whole: Any, tmp_path: Path) -> None:
    assert_same(step(whole.model, whole.items, tmp_path / "3", accumulate=3), whole.step)
    assert_same(step(whole.model, whole.items, tmp_path / "9", accumulate=9), whole.step)


def test_emitted_latents_count_their_own_tokens(
    tiny_folder: Path, asked: list[Sample], lab: Any, tmp_path: Path
) -> None:
    model = model_of(tiny_folder, LearnedLatents((2, 6), noise=0.5, emitted=True, emit_weight=2.0))
    items = items_of(model, asked[:6], lab)
    one, three = step(model, items, tmp_path / "1"), step(model, items, tmp_path / "3", accumulate=3)
    assert_same(three, one)
    assert three.log["emit"] == pytest.approx(one.log["emit"], rel=1e-5)


def test_one_batch_keeps_its_bits(whole: Any) -> None:
    """No factor is applied where there is nothing to weigh, and a factor of one moves no bit."""
    family, pad = whole.model.student.backbone.family, whole.model.student.backbone.tokenizer.pad_token_id
    batch = Collate(family, pad)(whole.items[:2])["batch"]
    ones = {name: torch.ones((), dtype=torch.float64) for name in whole.model.counts(batch)}
    plain, weighed = whole.model(batch), whole.model(batch, shares=ones)
    assert all(torch.equal(plain[name], weighed[name]) for name in plain)


def test_packed_equals_padded(whole: Any, tmp_path: Path) -> None:
    """Alone, with shared beginnings, and in three rows."""
    assert_same(step(whole.model, whole.items, tmp_path / "1", {"pack": True}), whole.step)
    assert_same(step(whole.model, whole.items, tmp_path / "2", {"share": True}, grouped=True, batch_size=3), whole.step)
    together = {"pack": True, "share": True}
    assert_same(step(whole.model, whole.items, tmp_path / "3", together), whole.step)
    assert_same(step(whole.model, whole.items, tmp_path / "4", together, accumulate=3), whole.step)


def test_bucketed_equals_padded(whole: Any, tmp_path: Path) -> None:
    """Micro-batches of like lengths: of samples, and of groups that are packed."""
    given: dict[str, Any] = {"bucketing": 2, "batch_size": 6}
    one, three = (step(whole.model, whole.items, tmp_path / f"{a}", accumulate=a, **given) for a in (1, 3))
    assert_same(three, one)
    given = {"bucketing": 2, "grouped": True, "batch_size": 2}
    one = step(whole.model, whole.items, tmp_path / "groups", **given)
    more = {"accumulate": 2, "packing": "pack", "shared_prefix": True}
    assert_same(
        step(whole.model, whole.items, tmp_path / "packed", {"pack": True, "share": True}, **given, **more), one
    )


@pytest.mark.parametrize("how", [{}, {"packing": "pack"}])
def test_a_budget_of_tokens_changes_no_gradient(whole: Any, tmp_path: Path, how: dict[str, Any]) -> None:
    """Its micro-batches hold unequal numbers of samples."""
    held = int(whole.items.lengths(range(9)).sum())
    given = {**how, "tokens": int(0.8 * held)}
    pack = {"pack": "packing" in how}
    one, three = (step(whole.model, whole.items, tmp_path / str(a), pack, accumulate=a, **given) for a in (1, 3))
    assert_same(three, one)
    assert_same(step(whole.model, whole.items, tmp_path / "plain", tokens=given["tokens"]), one)
    assert one.log["ntp"] != whole.step.log["ntp"]  # fewer samples than all


def test_a_recipe_trains_and_resumes_packed_by_a_budget(project: Path, tmp_path: Path) -> None:
    flags = {"steps": 4, "tokens": 400, "bucketing": 2, "packing": "pack", "grouped": "true", "shared_prefix": "true"}
    words = [str(project), *(word for name, value in flags.items() for word in (f"--train.{name}", str(value)))]
    assert cli_run("train", [*words, "--work-dir", str(tmp_path / "whole")]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "iter_000004")
    assert cli_run("train", [*words, "--work-dir", str(tmp_path / "cut"), "--resume"]) == 0
    last = Path("checkpoints") / "iter_000004" / "model.safetensors"
    assert (tmp_path / "cut" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
    anew = [*words, "--train.bucketing", "3", "--work-dir", str(tmp_path / "cut"), "--resume"]
    assert cli_run("train", anew) == 2


def in_two_processes(work: Callable[[], None]) -> None:
    """Run ``work`` in two forked processes with the environment that torchrun gives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in given.items()})
            try:
                work()
                os._exit(0)
            finally:  # an exception must not go on into the tests of the parent
                traceback.print_exception(sys.exc_info()[1])
                os._exit(1)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_change_no_gradient(whole: Any, tmp_path: Path, accumulate: int) -> None:
    """Eight samples whose answers are of unequal length, so that no process has the mean of the other's tokens."""
    items = Items(whole.items[:8])
    expected = step(whole.model, items, tmp_path / "one")

    def member() -> None:
        found = step(whole.model, items, tmp_path / "two", accumulate=accumulate)
        if os.environ["RANK"] == "0":
            save_file({n: g.contiguous() for n, g in found.grads.items()}, tmp_path / "two.safetensors")

    in_two_processes(member)
    log = json.loads((tmp_path / "two" / "log.jsonl").read_text().splitlines()[0])
    assert_same(SimpleNamespace(grads=load_file(tmp_path / "two.safetensors"), log=log), expected)


def test_two_processes_share_a_budget_packed(whole: Any, tmp_path: Path) -> None:
    """Groups of questions about one image, beginnings shared, packed; processes with unequal numbers of samples."""
    tokens = int(0.9 * whole.items.lengths(range(9)).sum())
    given = {"tokens": tokens, "grouped": True, "packing": "pack", "bucketing": 2}
    one = step(whole.model, whole.items, tmp_path / "one", {"pack": True}, **given)

    def member() -> None:
        found = step(whole.model, whole.items, tmp_path / "two", {"pack": True, "share": True}, **given)
        if os.environ["RANK"] == "0":
            save_file({n: g.contiguous() for n, g in found.grads.items()}, tmp_path / "two.safetensors")

    in_two_processes(member)
    log = json.loads((tmp_path / "two" / "log.jsonl").read_text().splitlines()[0])
    assert_same(SimpleNamespace(grads=load_file(tmp_path / "two.safetensors"), log=log), one)
