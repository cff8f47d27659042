"""Which samples a step sees: a pure function of the seed and the step, so that resuming needs no replay."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

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

    Raises:
        UserError: no samples, keys that do not match them, or a batch that cannot be split evenly.
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
    ) -> None:
        if length < 1:
            raise UserError(
                "the training data set is empty: nothing was selected from the data and traces of the recipe"
            )
        if batch_size % (accumulate * world_size):
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
        """SHA-256 of what the order depends on besides seed and batch size: how many samples, grouped how."""
        return hashlib.sha256(repr(self.units).encode()).hexdigest()

    def epoch(self, step: int) -> float:
        """Passes over the data that are complete before ``step``."""
        return step * self.batch_size / len(self.units)

    def batch(self, step: int) -> list[list[int]]:
        """The units of a step, for all processes: ``batch_size`` lists of data set indices."""
        count = len(self.units)
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self.units[self._permutation(self.seed, p // count, count)[p % count]] for p in positions]

    def micro_batch(self, step: int, part: int) -> list[int]:
        """Data set indices of this process's micro-batch ``part`` (0 <= part < accumulate) of a step."""
        size = self.batch_size // (self.accumulate * self.world_size)
        first = (part * self.world_size + self.rank) * size
        return [index for unit in self.batch(step)[first : first + size] for index in unit]

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.steps):
            for part in range(self.accumulate):
                yield self.micro_batch(step, part)

    def __len__(self) -> int:
        return max(0, self.steps - self.start) * self.accumulate
