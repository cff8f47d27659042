"""Batches come from workers in the same order, pinned where there is a GPU; waiting for them is told once."""

from __future__ import annotations

import json
import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from laavit.engine.hooks import data_wait
from laavit.engine.hooks.data_wait import DataWaitHook, cure
from laavit.engine.loader import build_loader
from laavit.engine.settings import TrainSettings
from laavit.registry import UserError
from laavit.structures import Batch, SharedPrefix


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, torch.utils.data.get_worker_info() is not None


ORDER = [[3, 1], [0], [8, 2, 4], [5], [7, 6]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_their_order_and_no_generator_moves(workers: int) -> None:
    settings = TrainSettings(workers=workers, prefetch=3)
    before = torch.get_rng_state()
    loader = build_loader(Numbers(), ORDER, list, settings, torch.device("cpu"))
    found = list(loader)
    assert [[index for index, _ in batch] for batch in found] == ORDER
    assert all(inside == bool(workers) for batch in found for _, inside in batch)
    assert loader.prefetch_factor == (3 if workers else None) and not loader.pin_memory
    assert torch.equal(before, torch.get_rng_state())


def test_on_a_gpu_batches_are_pinned_and_no_worker_runs_a_model() -> None:
    gpu = torch.device("cuda", 0)
    assert build_loader(Numbers(), ORDER, list, TrainSettings(), gpu).pin_memory
    data = Numbers()
    data.cache = SimpleNamespace(filled=False)  # type: ignore[attr-defined]
    build_loader(data, ORDER, list, TrainSettings(), gpu)
    build_loader(data, ORDER, list, TrainSettings(workers=1), torch.device("cpu"))
    with pytest.raises(UserError, match=r"fill it before the run .*, or set train\.workers=0"):
        build_loader(data, ORDER, list, TrainSettings(workers=1), gpu)
    data.cache = SimpleNamespace(filled=True)  # type: ignore[attr-defined]
    build_loader(data, ORDER, list, TrainSettings(workers=1), gpu)


def test_more_workers_than_cores_are_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "512")
    with caplog.at_level(logging.WARNING, logger="laavit.engine"):
        build_loader(Numbers(), ORDER, list, TrainSettings(workers=2), torch.device("cpu"))
    assert "2 for each of 512 processes" in caplog.text


def test_every_tensor_of_a_batch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(id(tensor)) or tensor + 1)
    zero = torch.zeros
    shared = SharedPrefix(zero(2), zero(1), zero(1))
    batch = Batch(
        zero(2, 3), zero(2, 3), zero(2, 3), None, [()], [(0, 1)], {"pixel_values": zero(4)}, [], [zero(2)],
        {"concept": {"vector": zero(2)}}, shared,
    )  # fmt: skip
    moved = batch.pin_memory()
    assert len(pinned) == 9 and moved.shared is not None and moved.features is not None
    for tensor in (moved.vision["pixel_values"], moved.features[0], moved.targets["concept"]["vector"]):
        assert bool((tensor == 1).all())
    assert bool((moved.shared.stops == 1).all()) and moved.position_ids is None and moved.spans == [()]


class Clock:
    """A run whose steps take a second each, of which some is waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def steps(self, hook: DataWaitHook, waits: list[float]) -> None:
        for index, waited in enumerate(waits):
            self.now += 1.0
            runner: Any = SimpleNamespace(train_loop=SimpleNamespace(data_seconds=waited))
            hook.after_train_iter(runner, index)


@pytest.mark.parametrize("wait, told", [(0.04, 0), (0.06, 1)])
def test_waiting_is_told_once_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wait: float, told: int
) -> None:
    hook = DataWaitHook(TrainSettings(workers=3), window=10)
    with caplog.at_level(logging.WARNING, logger="laavit.engine"):
        Clock(monkeypatch).steps(hook, [0.9] + [wait] * 35)  # workers start in the first step
    assert len(caplog.records) == told
    if told:
        assert "waited for data 6 % of the last 10 steps" in caplog.text
        assert "train.workers" in caplog.text and "student.max_pixels" in caplog.text


def test_the_cure_is_for_the_run_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_wait, "cores_and_processes", lambda: (16, 4))
    family = SimpleNamespace(takes_features=True)
    data = SimpleNamespace(builder=SimpleNamespace(family=family), cache=None, keeps=False)

    def told(workers: int = 0, epochs: float = 3, **more: Any) -> str:
        return cure(TrainSettings(workers=workers), SimpleNamespace(**{**vars(data), **more}), epochs)

    assert "more workers (train.workers, now 0; here are 4 cores for each process" in told()
    assert "more workers" in told(workers=3) and "more workers" not in told(workers=4)
    assert "more cores (train.workers is 4" in told(workers=4)
    assert "traces.vision_cache (for a frozen tower) and traces.keep" in told()
    has_cache = told(cache=object())  # named only where it is not taken yet
    assert "vision_cache" not in has_cache and "traces.keep" in has_cache
    blind = SimpleNamespace(family=SimpleNamespace(takes_features=False))
    for nothing_kept in (told(epochs=1), told(cache=object(), keeps=True), told(builder=blind)):
        assert "traces." not in nothing_kept and nothing_kept.endswith("smaller images (student.max_pixels)")
    assert "cache_vision" not in told()  # it spares the tower, which nobody waits for here
    assert cure(TrainSettings(), None, 9).endswith("student.max_pixels)")


def test_a_run_logs_the_share_and_its_bits_do_not_depend_on_workers(lab: Any, tmp_path: Any) -> None:
    found = [lab.run(tmp_path / str(workers), workers=workers, steps=4).last for workers in (0, 2)]
    assert lab.bits(found[0]) == lab.bits(found[1])
    for line in (tmp_path / "2" / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert 0 <= record["data_share"] <= 1
        share = record["data_seconds"] / record["step_seconds"]
        assert record["data_share"] == pytest.approx(share, rel=0.05, abs=1e-3)


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match=r"train\.prefetch: got 0; allowed: 1 or more"):
        TrainSettings(prefetch=0)
    with pytest.raises(UserError, match=r"train\.cache_vision: got -1"):
        TrainSettings(cache_vision=-1)
    with pytest.raises(UserError, match=r"train\.loss_rows: Liger's fused loss .*loss_rows=0"):
        TrainSettings(kernels="liger", loss_rows=8)
