"""Steps by length: nothing lost, nothing twice, budgets kept, work spread evenly, the same from any step on."""

from __future__ import annotations

import time
from itertools import chain, combinations, islice, pairwise
from typing import Any

import numpy as np
import pytest

from laavit.engine.buckets import UnitLengths, sample_lengths, sorted_steps
from laavit.engine.sampler import BatchSampler
from laavit.engine.settings import TrainSettings
from laavit.registry import UserError

LENGTHS = np.stack([np.random.default_rng(0).integers(20, 200, 60), np.random.default_rng(1).integers(4, 40, 60)], 1)
WHOLE = LENGTHS.sum(1)


def sampler(**given: Any) -> BatchSampler:
    settings = {"batch_size": 8, "steps": 40, "seed": 3, "lengths": LENGTHS, **given}
    return BatchSampler(len(LENGTHS), None, **settings)


def test_a_units_length_by_hand() -> None:
    lengths = np.array([[100, 5], [100, 7], [50, 20]])
    apart = UnitLengths.of(lengths, [[0, 1], [2]], shared=False, packed=False)
    assert apart.total.tolist() == [212, 70] and apart.widest.tolist() == [107, 70] and apart.rows.tolist() == [2, 1]
    assert apart.work([0, 1]) == 3 * 107
    shared = UnitLengths.of(lengths, [[0, 1], [2]], shared=True, packed=False)
    assert shared.total.tolist() == [112, 70] and shared.begins.tolist() == [100, 50]
    assert shared.work([0, 1]) == 2 * 100 + 3 * 20
    packed = UnitLengths.of(lengths, [[0, 1], [2]], shared=True, packed=True)
    assert packed.work([0, 1]) == 182


def test_buckets_hold_what_their_window_held() -> None:
    plain, bucketed = sampler(lengths=None), sampler(window=5)
    padded = dict.fromkeys(("plain", "bucketed"), 0)
    for window in range(3):
        steps = range(5 * window, 5 * window + 5)
        theirs, ours = ([s.batch(step) for step in steps] for s in (plain, bucketed))
        assert sorted(chain(*theirs)) == sorted(chain(*ours))
        for name, given in (("plain", theirs), ("bucketed", ours)):
            padded[name] += sum(len(step) * max(WHOLE[unit[0]] for unit in step) for step in given)
        longest = [max(WHOLE[unit[0]] for unit in step) for step in ours]
        assert longest != sorted(longest) and longest != sorted(longest)[::-1]  # a window's steps come in any order
    used = sum(WHOLE[unit[0]] for step in range(15) for unit in plain.batch(step))
    assert padded["bucketed"] - used < 0.35 * (padded["plain"] - used)
    assert bucketed.batch(0) == sampler(window=5, steps=7).batch(0)  # however long the run is


@pytest.mark.parametrize(
    "how", [{"window": 5}, {"tokens": 900}, {"tokens": 900, "window": 4}, {"tokens": 900, "packed": True, "window": 4}]
)
def test_any_start_and_any_number_of_processes(how: dict[str, Any]) -> None:
    whole = list(sampler(**how))
    assert list(sampler(**how, start=17)) == whole[17:]
    assert whole != list(sampler(**{**how, "seed": 4}))
    four = [sampler(**how, accumulate=2, rank=rank, world_size=2) for rank in range(2)]
    for step in (0, 1, 7, 30):
        parts = [own.micro_batch(step, part) for own in four for part in range(2)]
        assert all(parts) and sorted(chain(*parts)) == sorted(whole[step])


@pytest.mark.parametrize("window", [0, 4])
def test_a_budget_is_kept_and_nobody_is_left_out(window: int) -> None:
    steps = list(islice(sampler(tokens=900, window=window, steps=200), 200))
    held = [int(WHOLE[step].sum()) for step in steps]
    assert max(held) <= 900 and np.mean(held) > 800
    counts = np.bincount(list(chain(*steps)), minlength=60)
    assert counts.max() - counts.min() <= (2 if window == 0 else 3)
    assert sampler(tokens=900).epoch(10) == pytest.approx(9000 / WHOLE.sum())


def test_a_budget_holds_the_longest_sample() -> None:
    with pytest.raises(UserError, match=rf"each of a step's 8 micro-batches .*; allowed: {8 * WHOLE.max()} or more"):
        sampler(tokens=900, accumulate=8)
    with pytest.raises(UserError, match=r"train\.tokens: got -1"):
        TrainSettings(tokens=-1)
    with pytest.raises(UserError, match="list has no 'lengths'; set both to 0"):
        sample_lengths([1, 2], None)  # type: ignore[arg-type]


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_have_about_the_same_work(packed: bool) -> None:
    lengths = UnitLengths.of(LENGTHS, [[i] for i in range(60)], shared=False, packed=packed)
    units = list(range(24))
    loads = [lengths.work(part) for part in lengths.split(units, 4, even=False)]
    assert max(loads) - min(loads) <= (WHOLE.max() if packed else 0.35 * max(loads))
    even = lengths.split(units, 4, even=True)
    assert [len(part) for part in even] == [6] * 4
    plain = [lengths.work(units[start : start + 6]) for start in range(0, 24, 6)]
    assert max(map(lengths.work, even)) <= max(plain)
    assert [len(part) for part in lengths.split(units[:4], 4, even=False)] == [1] * 4


@pytest.mark.parametrize("packed", [False, True])
def test_runs_of_neighbours_are_the_best_there_are(packed: bool) -> None:
    lengths = UnitLengths.of(LENGTHS, [[i] for i in range(60)], shared=False, packed=packed)
    order = lengths.ordered(range(12))
    cuts = ([0, *cut, 12] for cut in combinations(range(1, 12), 2))
    best = min(max(lengths.work(order[a:b]) for a, b in pairwise(cut)) for cut in cuts)
    found = lengths.split(range(12), 3, even=False)
    assert len(found) == 3 and max(map(lengths.work, found)) == best and list(chain(*found)) == order


def test_an_order_of_its_own_for_every_window() -> None:
    lengths = UnitLengths.of(LENGTHS, [[i] for i in range(60)], shared=False, packed=False)
    first, second = (sorted_steps(lengths, range(60), 10, 0, number) for number in range(2))
    assert sorted(first) == sorted(second) and first != second


def test_a_window_of_one_step_sorts_its_micro_batches_alone() -> None:
    plain, sorted_ = (sampler(lengths=lengths, window=1, accumulate=4) for lengths in (None, LENGTHS))
    for step in range(5):
        assert sorted(chain(*plain.batch(step))) == sorted(chain(*sorted_.batch(step)))
        parts = [[int(WHOLE[i]) for i in sorted_.micro_batch(step, part)] for part in range(4)]
        assert all(len(part) == 2 for part in parts) and all(min(a) >= max(b) for a, b in pairwise(parts))


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_of_thousands_is_split_in_no_time(packed: bool) -> None:
    """A million tokens over 64 processes, each of which splits every step; the runs are those of ``work``."""
    draw = np.random.default_rng(0)
    lengths = np.stack([draw.integers(200, 600, 3000), draw.integers(30, 60, 3000)], 1)
    units = UnitLengths.of(lengths, [[i] for i in range(3000)], shared=True, packed=packed)
    order = units.ordered(range(3000))
    began = time.process_time()
    found = units.split(order, 64, even=False)
    assert time.process_time() - began < 0.5
    assert len(found) == 64 and [unit for run in found for unit in run] == order
    most = max(map(units.work, found))
    for run, following in pairwise(units._runs(order, most)):
        assert units.work(run) <= most < units.work([*run, following[0]])
