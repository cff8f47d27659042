"""Batches by length: units of like length together, as many as a budget of tokens holds, evenly over micro-batches.

A unit is a sample, or a group of samples that stay together. Everything here is a function of the units' lengths, the
seed and the step, so that resuming replays no data, and every number of processes sees the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from laavit.engine.distributed import gather, rank_and_world
from laavit.registry import UserError


@dataclass(frozen=True)
class UnitLengths:
    """How long units are, int64 [U] each.

    Args:
        total: tokens that reading a unit takes. begins: those of a beginning that its samples share, else 0.
        rows: its samples. widest: the most tokens that one of them has, a shared beginning left out.
        packed: whether a micro-batch is read without padding.
    """

    total: np.ndarray
    begins: np.ndarray
    rows: np.ndarray
    widest: np.ndarray
    packed: bool = False

    @classmethod
    def of(cls, lengths: np.ndarray, units: Sequence[Sequence[int]], shared: bool, packed: bool) -> UnitLengths:
        """Lengths of units.

        Args:
            lengths: of samples, [n, 2]: up to the end of the last image, and after it. units: their samples.
            shared: whether the samples of a unit are read with their beginning shared.
        """
        begins, after = lengths[:, 0], lengths[:, 1]
        if not shared:
            begins, after = np.zeros_like(begins), begins + after
        rows = np.array([len(unit) for unit in units])
        flat, starts = np.fromiter(chain.from_iterable(units), np.int64), np.cumsum(rows) - rows
        first, widest = (np.maximum.reduceat(each[flat], starts) for each in (begins, after))
        return cls(first + np.add.reduceat(after[flat], starts), first, rows, widest, packed)

    def work(self, units: Sequence[int]) -> int:
        """Tokens that a micro-batch of these units has the decoder read, padding included."""
        if self.packed:
            return int(self.total[units].sum())
        return int(len(units) * self.begins[units].max() + self.rows[units].sum() * self.widest[units].max())

    def ordered(self, units: Sequence[int], longest_first: bool = True) -> list[int]:
        """Units by the length of their longest sample, those of one length by their number."""
        size = self.begins + self.widest
        return sorted(units, key=lambda unit: (-size[unit] if longest_first else size[unit], unit))

    def split(self, units: Sequence[int], parts: int, even: bool) -> list[list[int]]:
        """A step's units as micro-batches of about the same work, none of them empty.

        Neighbours in length stay together, packed ones too: attention lays their samples out padded. Only where packed
        micro-batches must have the same number of units, which neighbours would make unequal work, they are mixed.

        Args:
            parts: micro-batches. even: each gets the same number of units.
        """
        if even and self.packed:
            order = sorted(units, key=lambda unit: (-self.total[unit], unit))
            return self._by_total(order, parts, -(-len(order) // parts))
        order = self.ordered(units)
        if even:
            size = len(order) // parts
            return [order[start : start + size] for start in range(0, len(order), size)]
        return self._by_runs(order, parts)

    def _by_total(self, order: Sequence[int], parts: int, room: int) -> list[list[int]]:
        """The longest first, each to the micro-batch with the fewest tokens that has room (Graham, 1969)."""
        found: list[list[int]] = [[] for _ in range(parts)]
        loads = [0] * parts
        for unit in order:
            place = min((p for p in range(parts) if len(found[p]) < room), key=lambda p: (loads[p], p))
            found[place].append(unit)
            loads[place] += int(self.total[unit])
        return found

    def _by_runs(self, order: Sequence[int], parts: int) -> list[list[int]]:
        """Runs of neighbours, the heaviest of which has as little work as may be."""
        low, high = max(self.work([unit]) for unit in order), self.work(order)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self._runs(order, middle)) <= parts else (middle + 1, high)
        found = self._runs(order, low)
        while len(found) < parts:  # fewer runs than micro-batches: the longest that can be cut is
            cut = max((p for p in range(len(found)) if len(found[p]) > 1), key=lambda p: self.work(found[p]))
            half = len(found[cut]) // 2
            found[cut : cut + 1] = [found[cut][:half], found[cut][half:]]
        return found

    def _runs(self, order: Sequence[int], most: int) -> list[list[int]]:
        """Neighbours, as many together as have at most so much ``work``; which is added up, for steps of thousands."""
        found: list[list[int]] = [[]]
        begin = rows = wide = whole = 0  # of the last run
        parts = (each[order].tolist() for each in (self.begins, self.rows, self.widest, self.total))
        for unit, *own in zip(order, *parts, strict=True):
            held = max(begin, own[0]), rows + own[1], max(wide, own[2]), whole + own[3]
            work = held[3] if self.packed else (len(found[-1]) + 1) * held[0] + held[1] * held[2]
            if found[-1] and work > most:
                found.append([])
                held = own[0], own[1], own[2], own[3]
            found[-1].append(unit)
            begin, rows, wide, whole = held
        return found

    def check_budget(self, tokens: int, parts: int) -> None:
        """Raises: UserError: a step of so many tokens may hold fewer units than micro-batches."""
        longest = int(self.total.max())
        if tokens < longest * parts:
            raise UserError(
                f"train.tokens: got {tokens}; the longest sample (with train.grouped: group) has about {longest}, and "
                f"each of a step's {parts} micro-batches must hold it; allowed: {longest * parts} or more"
            )


def sorted_steps(lengths: UnitLengths, units: Sequence[int], window: int, seed: int, number: int) -> list[list[int]]:
    """The units of a window of steps as steps of neighbours in length, in an order drawn for the window.

    Args:
        units: as many for each step. window: steps. number: which window it is, from 0.
    """
    order, size = lengths.ordered(units), len(units) // window
    steps = [order[start : start + size] for start in range(0, len(order), size)]
    return [steps[place] for place in np.random.RandomState([seed, number, 1]).permutation(window)]


def budgeted_steps(
    lengths: UnitLengths, draw: Callable[[int], int], tokens: int, window: int, seed: int
) -> Iterator[list[int]]:
    """Steps of as many units as a budget of tokens holds, without end.

    With a window, units worth that many steps are sorted by length before they are cut into steps, and the steps of a
    window come in an order drawn for it. What does not fill a step goes on to the next window; these are sorted up and
    down by turns, so that nobody waits for ever.

    Args:
        draw: the unit at a position of the endless sequence. tokens: of a step. window: steps; 1 sorts nothing.
    """
    pool: list[int] = []
    position = number = 0
    while True:
        held = int(lengths.total[pool].sum()) if pool else 0
        while held <= window * tokens:  # more than the window holds, so that each of its steps is full
            pool.append(draw(position))
            held += int(lengths.total[pool[-1]])
            position += 1
        order = lengths.ordered(pool, number % 2 == 0) if window > 1 else pool
        steps, pool = _filled(lengths, order, tokens)
        drawn = np.random.RandomState([seed, number, 1]).permutation(len(steps)) if window > 1 else range(len(steps))
        yield from (steps[place] for place in drawn)
        number += 1


def _filled(lengths: UnitLengths, order: Sequence[int], tokens: int) -> tuple[list[list[int]], list[int]]:
    """Runs of units that fill a budget, and the rest that may not."""
    steps: list[list[int]] = []
    own: list[int] = []
    held = 0
    for unit in order:
        if own and held + lengths.total[unit] > tokens:
            steps.append(own)
            own, held = [], 0
        own.append(unit)
        held += int(lengths.total[unit])
    return steps, own


def sample_lengths(dataset: Any, device: torch.device) -> np.ndarray:
    """About how many tokens every sample has, int64 [n, 2]; each process looks at its share of them.

    Raises:
        UserError: the data set does not know.
    """
    if not hasattr(dataset, "lengths"):
        raise UserError(f"train.bucketing, train.tokens: {type(dataset).__name__} has no 'lengths'; set both to 0")
    rank, world = rank_and_world()
    count = len(dataset)
    own = np.zeros((-(-count // world), 2), dtype=np.int64)
    places = range(rank, count, world)
    own[: len(places)] = dataset.lengths(places)
    parts = gather(torch.from_numpy(own), device)  # [W, n / W, 2]; process r has r, r + W, ...
    return parts.transpose(0, 1).reshape(-1, 2)[:count].numpy()
