"""Which samples a step sees: a pure function of the seed and the step, so that resuming needs no replay.

Where lengths count (``train.bucketing``, ``train.tokens``), laavit/engine/buckets.py says which; it is asked from here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from laavit.engine.buckets import UnitLengths, budgeted_steps, sorted_steps
from laavit.registry import UserError


def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of one pass over ``length`` units: int64 [length].

    NumPy's legacy generator is used because its stream is frozen: the order is the same on every machine and version.
    """
    return np.random.RandomState([seed, epoch]).permutation(length)


class BatchSampler(Sampler[list[int]]):
    """Micro-batches of data set indices for every step from ``start`` on.

    The units (samples, or groups of samples) are drawn epoch by epoch without replacement; step t takes the units at
    positions ``t * batch_size ... (t + 1) * batch_size - 1`` of the endless sequence of permuted epochs, so a batch may
    begin in one epoch and end in the next, and nothing is dropped. Units are split over micro-batches, then over
    processes, in order: every number of processes sees the same global batches.

    Args:
        length: samples of the data set.
        dataset_groups: one key a sample; samples of one key form one unit. None: every sample is a unit.
        batch_size: units of one optimizer step, over all micro-batches and processes.
        steps: optimizer steps of the whole run.
        seed: of the permutations, 0 <= seed < 2**32.
        accumulate: micro-batches a step.
        rank: this process. world_size: all processes.
        start: first step to yield; set it to resume.
        lengths: of samples, int64 [n, 2], up to the end of the last image and after it; needed by what follows.
        window: steps whose units are sorted by length before they are cut into steps; 0 sorts nothing.
        tokens: of a step, in place of ``batch_size``; 0 is none.
        shared: the samples of a group share their beginning. packed: a micro-batch is read without padding.

    Raises:
        UserError: no samples, keys that do not match them, a batch that cannot be split evenly, or a budget of tokens
            that is too small.
    """

    def __init__(
        self,
        length: int,
        dataset_groups: Sequence[Hashable] | None,
        *,
        batch_size: int,
        steps: int,
        seed: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        lengths: np.ndarray | None = None,
        window: int = 0,
        tokens: int = 0,
        shared: bool = False,
        packed: bool = False,
    ) -> None:
        if length < 1:
            raise UserError(
                "the training data set is empty: nothing was selected from the data and traces of the recipe"
            )
        if not tokens and batch_size % (accumulate * world_size):
            raise UserError(
                f"train.batch_size: got {batch_size}, which cannot be split evenly into {accumulate} micro-batches "
                f"on {world_size} processes; allowed: multiples of {accumulate * world_size}"
            )
        if dataset_groups is not None and len(dataset_groups) != length:
            raise UserError(f"the data set has {length} samples but {len(dataset_groups)} group keys")
        self.units = self._units(length, dataset_groups)
        self.batch_size, self.steps, self.seed = batch_size, steps, seed
        self.accumulate, self.rank, self.world_size, self.start = accumulate, rank, world_size, start
        # Two epochs suffice: a batch that is larger than the data set recomputes, which is as right.
        self._permutation = lru_cache(maxsize=2)(permutation)
        self.window, self.tokens = window, tokens
        self.lengths = UnitLengths.of(lengths, self.units, shared, packed) if lengths is not None else None
        if self.lengths is not None and tokens:
            self.lengths.check_budget(tokens, accumulate * world_size)
        self._steps = lru_cache(maxsize=2)(self._sorted_window)
        self._split = lru_cache(maxsize=2)(self._micro_batches)
        self._walk: Iterator[list[int]] = iter(())
        self._walked, self._budgeted = -1, list[int]()

    @staticmethod
    def _units(length: int, groups: Sequence[Hashable] | None) -> list[list[int]]:
        if groups is None:
            return [[index] for index in range(length)]
        units: dict[Hashable, list[int]] = {}
        for index, key in enumerate(groups):
            units.setdefault(key, []).append(index)
        return list(units.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the order depends on besides settings: how many samples, grouped how, and how long."""
        told = repr(self.units) if self.lengths is None else repr((self.units, self.lengths.total.tolist()))
        return hashlib.sha256(told.encode()).hexdigest()

    def epoch(self, step: int) -> float:
        """Passes over the data that are complete before ``step``; about so many where a step is a budget of tokens."""
        if self.lengths is not None and self.tokens:
            return step * self.tokens / int(self.lengths.total.sum())
        return step * self.batch_size / len(self.units)

    def batch(self, step: int) -> list[list[int]]:
        """The units of a step, for all processes: lists of data set indices, ``batch_size`` of them without budget."""
        return [self.units[number] for number in self._numbers(step)]

    def micro_batch(self, step: int, part: int) -> list[int]:
        """Data set indices of this process's micro-batch ``part`` (0 <= part < accumulate) of a step."""
        own = self._split(step)[part * self.world_size + self.rank]
        return [index for number in own for index in self.units[number]]

    def _draw(self, position: int) -> int:
        """The number of the unit at a position of the endless sequence of permuted epochs."""
        count = len(self.units)
        return int(self._permutation(self.seed, position // count, count)[position % count])

    def _numbers(self, step: int) -> list[int]:
        """The numbers of a step's units."""
        if self.lengths is not None and self.tokens:
            return self._budgeted_step(step)
        if self.lengths is not None and self.window > 1:
            return self._steps(step // self.window)[step % self.window]
        return [self._draw(p) for p in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def _sorted_window(self, number: int) -> list[list[int]]:
        assert self.lengths is not None, "asked for where lengths are known"
        size = self.window * self.batch_size
        units = [self._draw(position) for position in range(number * size, (number + 1) * size)]
        return sorted_steps(self.lengths, units, self.window, self.seed, number)

    def _budgeted_step(self, step: int) -> list[int]:
        """Steps are walked through from the first: where one begins depends on the lengths before it, not on data."""
        assert self.lengths is not None, "asked for where lengths are known"
        if step < self._walked or self._walked < 0:
            self._walk = budgeted_steps(self.lengths, self._draw, self.tokens, max(1, self.window), self.seed)
            self._walked = -1
        while self._walked < step:
            self._budgeted = next(self._walk)
            self._walked += 1
        return self._budgeted

    def _micro_batches(self, step: int) -> list[list[int]]:
        """A step's units by micro-batch, all processes': of about the same work where lengths are known."""
        numbers, parts = self._numbers(step), self.accumulate * self.world_size
        if self.lengths is not None:
            return self.lengths.split(numbers, parts, even=not self.tokens)
        size = len(numbers) // parts
        return [numbers[first : first + size] for first in range(0, len(numbers), size)]

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.steps):
            for part in range(self.accumulate):
                yield self.micro_batch(step, part)

    def __len__(self) -> int:
        return max(0, self.steps - self.start) * self.accumulate
