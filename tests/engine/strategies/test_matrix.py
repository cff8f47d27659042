"""One gradient: however a step is spread over processes, cut into micro-batches, laid out, read and attended to.

The product of strategies, accumulation, batches, shared beginnings, checkpointing and attention functions, each of its
cells against one plain run of a single process, in float32: what every parameter's gradient is before it is clipped,
at both of two steps, between which the optimizer moves all weights and the gate opens; and what is logged of losses.

On are: latents of varying number, the gate on two paths and some layers, the tower and all else that learns, recorded
rows, and every registered target but those that compare the samples of a micro-batch (InfoNCE): what these are depends
on the split. The samples are one to three questions about one or two images of unequal sizes, with answers of unequal
length. Nothing of the product is refused but FlexAttention, whose gradients PyTorch has on GPUs alone: the test takes
its plain form, and makes sure of the refusal.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from combining import HEADER, target_of, trace
from PIL import Image
from processes import launch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from laavit import flex_attention
from laavit.backbones import PromptSettings
from laavit.data.aligned import AlignedDataset, Collate
from laavit.engine import BatchSampler, TrainSettings, train
from laavit.engine.distributed import process_group
from laavit.engine.strategies import DDP, FSDP2, Single, Strategy
from laavit.gates import CosineGate
from laavit.latents import LearnedLatents
from laavit.model import LaViT
from laavit.recipe import Recipe, cards
from laavit.registry import UserError
from laavit.structures import Box, Sample
from laavit.students import HFStudent
from laavit.traces.store import TraceStore, TraceWriter

#: groups of questions about the same images in a step: one for each of 4 x 4 micro-batches
GROUPS = 16
STEPS = 2
#: width and height in pixels of what the images of one group after another are; two in every fourth
SIZES = ((16, 32), (32, 32), (48, 16), (32, 48), (16, 16))
WORDS = (("what colour?", "red"), ("is it left of it?", "yes it is, left of the red circle"), ("how many?", "no"))
BOXES = (Box(0.1, 0.2, 0.6, 0.9), Box(0.0, 0.0, 0.5, 0.4))

STRATEGIES: dict[str, tuple[int, Callable[[], Strategy]]] = {
    "single": (1, Single),
    "ddp of 2": (2, DDP),
    "fsdp2 of 2": (2, FSDP2),
    "fsdp2 of 4": (4, FSDP2),
}
BATCHES: dict[str, dict[str, Any]] = {"padded": {}, "bucketed": {"bucketing": STEPS}, "packed": {"packing": "pack"}}
ATTENTION = {"sdpa": "laavit", "flex": "laavit_flex"}


@dataclass(frozen=True)
class Cell:
    """One way to compute the steps; the defaults are the plain one."""

    strategy: str = "single"
    accumulate: int = 1
    batches: str = "padded"
    shared: bool = False
    checkpointing: bool = False
    attention: str = "sdpa"

    def __str__(self) -> str:
        beginnings = "shared" if self.shared else "separate"
        kept = "checkpointed" if self.checkpointing else "kept"
        return f"{self.strategy}, accumulate {self.accumulate}, {self.batches}, {beginnings}, {kept}, {self.attention}"

    @property
    def settings(self) -> TrainSettings:
        return TrainSettings(
            steps=STEPS, batch_size=GROUPS, accumulate=self.accumulate, grouped=True, shared_prefix=self.shared,
            # of the paper's size: AdamW's first update is +-lr even where a gradient is rounding alone
            gradient_checkpointing=self.checkpointing, lr=1e-5, warmup_ratio=0.0, schedule="constant",
            weight_decay=0.1, checkpoint_every=0, log_every=1, threads=1, tensorboard=False, device="cpu",
            **BATCHES[self.batches],
        )  # fmt: skip


def every() -> Iterator[Cell]:
    for values in product(STRATEGIES, (1, 4), BATCHES, (False, True), (False, True), ATTENTION):
        yield Cell(*values)


#: nine cells of one and two processes in which every two choices meet
SOME = (
    Cell("single", 4, "padded", False, False, "flex"),
    Cell("single", 1, "bucketed", True, True, "flex"),
    Cell("single", 1, "packed", True, True, "sdpa"),
    Cell("ddp of 2", 1, "padded", True, False, "sdpa"),
    Cell("ddp of 2", 1, "bucketed", False, False, "flex"),
    Cell("ddp of 2", 4, "packed", False, True, "sdpa"),
    Cell("fsdp2 of 2", 1, "padded", False, True, "sdpa"),
    Cell("fsdp2 of 2", 4, "bucketed", True, False, "sdpa"),
    Cell("fsdp2 of 2", 1, "packed", False, False, "flex"),
)


class Items(list[Any]):
    """Encoded samples with what the targets prepared, as the data set gives them."""

    @property
    def groups(self) -> list[Any]:
        return [encoded.sample.images for encoded, _ in self]

    def lengths(self, places: Sequence[int]) -> np.ndarray:
        stops = [max(span.end for span in self[place][0].spans) for place in places]
        whole = [len(self[place][0].input_ids) for place in places]
        return np.array([[stop, length - stop] for stop, length in zip(stops, whole, strict=True)])


def questions(folder: Path) -> list[Sample]:
    """One to three questions about each of as many images, or pairs of images, as two steps take."""
    random, found = np.random.default_rng(0), []
    for group in range(GROUPS * STEPS):
        images = tuple(folder / f"{group}-{number}.png" for number in range(1 + (group % 4 == 3)))
        for number, path in enumerate(images):
            width, height = SIZES[(group + number) % len(SIZES)]
            Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        boxes = (BOXES[0], replace(BOXES[1], image=len(images) - 1))
        for number, (question, answer) in enumerate(WORDS[: 1 + group % 3]):
            found.append(Sample(f"{group}-{number}", images, question, answer, boxes, meta={"hops": [[0], [1]]}))
    return found


def arranged(items: Items) -> dict[bool, Items]:
    """The items in such an order that both steps have the same samples, sorted by length (True) or drawn (False)."""
    options = {"batch_size": GROUPS, "steps": STEPS, "seed": 0}
    lengths = items.lengths(range(len(items)))
    by_length = BatchSampler(len(items), items.groups, **options, lengths=lengths, window=STEPS)  # type: ignore[arg-type]
    steps = [by_length.batch(step) for step in range(STEPS)]
    plain = BatchSampler(len(by_length.units), None, **options)  # type: ignore[arg-type]
    units: list[Any] = [None] * len(by_length.units)
    for step, taken in enumerate(steps):  # drawn, not by length, within a step
        for (place,), unit in zip(plain.batch(step), np.random.default_rng(step).permutation(GROUPS), strict=True):
            units[place] = taken[unit]
    return {True: items, False: Items(items[place] for unit in units for place in unit)}


@dataclass
class Steps:
    """What two steps left: gradients by parameter, and the logged losses."""

    gradients: list[dict[str, Tensor]]
    losses: list[dict[str, float]]

    def unlike(self, plain: Steps, most: float = 1e-5) -> list[str]:
        """What is further from the plain run than a share, in words.

        The whole gradient by its norm, and each parameter's by its own, but for what is next to nothing in the whole:
        there float32 leaves rounding alone.
        """
        found = []
        for step, (ours, theirs) in enumerate(zip(self.gradients, plain.gradients, strict=True)):
            if ours.keys() != theirs.keys():
                return [f"step {step}: other parameters have gradients: {sorted(ours.keys() ^ theirs.keys())}"]
            whole = torch.stack([gradient.double().norm() for gradient in theirs.values()]).norm()
            off = {name: (ours[name].double() - gradient.double()).norm() for name, gradient in theirs.items()}
            shares = {"the whole": torch.stack(list(off.values())).norm() / whole}
            shares |= {name: off[name] / theirs[name].double().norm().clamp(min=1e-3 * whole) for name in off}
            found += [f"step {step}: gradient of {n} by {float(s):.1e}" for n, s in shares.items() if not s <= most]
        for step, (own, other) in enumerate(zip(self.losses, plain.losses, strict=True)):
            apart = {name: abs(own[name] - value) / max(abs(value), 1e-6) for name, value in other.items()}
            found += [f"step {step}: {name} by {share:.1e}" for name, share in apart.items() if not share <= most]
        return found


@dataclass
class Lab:
    """A model, its data, and the plain run of both.

    Args:
        model: copied for every run. data: by whether it is to be sorted by length. keep: makes hooks that keep
            gradients. folder: for run folders.
    """

    model: LaViT
    data: Mapping[bool, Items]
    keep: Callable[[], Any]
    folder: Path
    plain: Steps = field(init=False)

    def run(self, cell: Cell, name: str = "") -> Steps:
        """Both steps, in this process or as its part in several; losses in process 0 alone."""
        model, settings, folder = copy.deepcopy(self.model), cell.settings, self.folder / (name or str(cell))
        model.student.model.set_attn_implementation({"text_config": ATTENTION[cell.attention], "vision_config": "sdpa"})
        backbone, hook = model.student.backbone, self.keep()
        packed = settings.packing == "pack"
        collate = Collate(backbone.family, backbone.tokenizer.pad_token_id, settings.shared_prefix, packed)
        strategy = STRATEGIES[cell.strategy][1]()
        train(model, self.data[settings.bucketing > 0], collate, settings, folder, {}, hooks=[hook], strategy=strategy)
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        names = ("loss", "ntp", *model.named_targets)
        return Steps(hook.steps, [{name: line[name] for name in names} for line in lines])

    def check(self, cells: Sequence[Cell]) -> None:
        """Run them all, those of as many processes in the same ones, and compare each with the plain run."""
        wrong = {}
        for count in sorted({STRATEGIES[cell.strategy][0] for cell in cells}):
            told = self.folder / f"{count}.json"

            def work(rank: int, count: int = count, told: Path = told) -> None:
                found = {}
                with process_group(torch.device("cpu")):
                    for cell in cells:
                        if STRATEGIES[cell.strategy][0] == count:
                            try:
                                unlike = self.run(cell).unlike(self.plain)
                            except Exception as error:
                                raise AssertionError(str(cell)) from error
                            found |= {str(cell): unlike} if unlike else {}
                if rank == 0:
                    told.write_text(json.dumps(found))

            assert launch(work, count) == [0] * count, "a process failed: its trace stands above"
            wrong |= json.loads(told.read_text())
        few = {cell: own[:8] + [f"and {len(own) - 8} more"] * (len(own) > 8) for cell, own in wrong.items()}
        lines = [f"{cell}\n" + "".join(f"    {line}\n" for line in own) for cell, own in few.items()]
        assert not wrong, f"{len(wrong)} of {len(cells)} cells differ from the plain run:\n{''.join(lines)}"


@pytest.fixture(scope="module")
def matrix(
    write_tiny: Callable[..., Path], keep_gradients: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory
) -> Lab:
    folder = tmp_path_factory.mktemp("matrix")
    student = HFStudent(str(write_tiny(folder / "model", layers=2)), "float32", freeze=())
    student.setup(LearnedLatents((2, 4), noise=0.5, seed=1), torch.Generator().manual_seed(3))
    names = [name for name in cards("targets") if target_of(name).min_batch == 1]
    targets = {name: Recipe({"targets": {"t": name}}).build("targets.t") for name in names}
    torch.manual_seed(5)
    for target in targets.values():
        target.setup(student.backbone.width, student.backbone.depth, student.latents, HEADER)
    gate = CosineGate(3, paths=("answer->image", "question->image"), layers="last 1")
    model = LaViT(student, gate, targets).train()
    builder, samples = student.builder(PromptSettings(system="Look.")), questions(folder)
    with TraceWriter(folder / "traces", HEADER) as writer:
        for number, sample in enumerate(samples):
            writer.append(trace(sample, builder.encode(sample, sample.answer).labels, number))
    items = Items(AlignedDataset(samples, builder, targets, TraceStore(folder / "traces")))
    lab = Lab(model, arranged(items), keep_gradients, folder)
    lab.plain = lab.run(Cell(), "plain")
    return lab


@pytest.fixture
def plain_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention as PyTorch's own operations, which have gradients."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex_attention, "_gradient", lambda *tensors: False)


def test_some_of_one_and_two_processes(matrix: Lab, plain_flex: None) -> None:
    matrix.check(SOME)


def test_some_have_every_pair() -> None:
    """Whatever two of the six choices are, some cell has both."""

    def pairs(cells: Iterable[Cell]) -> set[Any]:
        return {pair for cell in cells for pair in combinations(vars(cell).items(), 2)}

    assert pairs(SOME) == pairs(cell for cell in every() if STRATEGIES[cell.strategy][0] < 4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_whole_product(strategy: str, matrix: Lab, plain_flex: None) -> None:
    matrix.check([cell for cell in every() if cell.strategy == strategy])


def test_flex_attention_on_the_cpu_is_refused(matrix: Lab) -> None:
    with pytest.raises(UserError, match="FlexAttention has no gradients on the CPU; take 'laavit'"):
        matrix.run(Cell(attention="flex"), "refused")
