"""Preparing samples (opening images, tokenising) ahead of the teacher, in worker processes, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from laavit.images import image_size
from laavit.registry import UserError
from laavit.structures import Sample
from laavit.teachers.base import Preparer

#: batches that every worker has ready or in work: bounds the memory, whatever the teacher's speed
AHEAD = 2


class Prepared(NamedTuple):
    """A sample as the teacher reads it, or why it cannot be read."""

    sample_id: str
    value: Any
    reason: str | None


class Batches(Dataset[list[Prepared]]):
    """Batches of samples, prepared when asked for; a sample that cannot be read is told, never raised."""

    def __init__(self, preparer: Preparer, batches: Sequence[Sequence[Sample]]) -> None:
        self.preparer, self.batches = preparer, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[Prepared]:
        return [self._prepare(sample) for sample in self.batches[index]]

    def _prepare(self, sample: Sample) -> Prepared:
        try:
            return Prepared(sample.id, self.preparer(sample), None)
        except UserError as error:
            return Prepared(sample.id, None, str(error))


def prepared(preparer: Preparer, batches: Sequence[Sequence[Sample]], workers: int) -> Iterator[list[Prepared]]:
    """Every batch, prepared, in order.

    Args:
        workers: processes; 0 prepares in this one.

    Raises:
        UserError: a worker process died (the machine's memory, or its shared memory, ran out).
    """
    loader = DataLoader(
        Batches(preparer, batches),
        batch_size=None,
        num_workers=min(workers, len(batches)),
        collate_fn=_same,
        prefetch_factor=AHEAD if workers and batches else None,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            "a data worker died, most likely because memory or /dev/shm ran out: give fewer extract.workers (0 works "
            f"without any) or a smaller extract.batch_size ({error})"
        ) from error


def _same(batch: list[Prepared]) -> list[Prepared]:
    return batch


def by_pixels(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Batches of up to ``size`` samples of like images, the greatest first: what does not fit does not fit at once.

    The sort is stable, so that samples of equal size keep their order; only the images' headers are read.
    """
    ordered = sorted(samples, key=_pixels, reverse=True)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _pixels(sample: Sample) -> int:
    try:
        return sum(width * height for width, height in map(image_size, sample.images))
    except UserError:
        return 0  # the preparer will say what is wrong with it
