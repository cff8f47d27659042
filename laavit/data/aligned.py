"""Samples beside their traces: what a training step reads, worked out once a sample, in data workers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from laavit.backbones.base import collate
from laavit.backbones.chat import SequenceBuilder
from laavit.backbones.vision_cache import VisionCache
from laavit.registry import SETTINGS, UserError
from laavit.structures import Batch, Encoded, Sample
from laavit.targets.base import Target, stack
from laavit.traces.store import TraceStore


@SETTINGS.register_module(name="traces")
@dataclass(frozen=True)
class TraceSettings:
    """Which traces a run trains on.

    Args:
        path: the trace store's folder; None for a run that needs none.
        select: filters whose verdict a sample must pass (each is a column of the store).
        vision_cache: folder for the features of a frozen vision tower; None works them out every time.
        keep: keep encoded samples in memory (small data sets; with cached features a sample costs a few kB).
    """

    path: str | None = None
    select: tuple[str, ...] = ()
    vision_cache: str | None = None
    keep: bool = False


Item = tuple[Encoded, dict[str, dict[str, Tensor]]]


class AlignedDataset(Dataset[Item]):
    """Encoded samples with what each target prepared for them.

    Args:
        samples: the samples to train on. builder: makes their sequences. targets: by name.
        store: traces; needed when a target needs them. cache: features of a frozen vision tower, or None.
        keep: keep encoded samples in memory (small data sets; with cached features a sample costs a few kB).

    Raises:
        UserError: before the first step, when a sample's trace is missing.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        builder: SequenceBuilder,
        targets: Mapping[str, Target] | None = None,
        store: TraceStore | None = None,
        cache: VisionCache | None = None,
        keep: bool = False,
    ) -> None:
        self.samples, self.builder, self.targets = samples, builder, dict(targets or {})
        self.store, self.cache = store, cache
        self._kept: dict[int, Item] | None = {} if keep else None
        if not len(samples):
            raise UserError(
                "there is no sample to train on: the data set is empty, or no sample passes the selected filters"
            )
        if any(target.needs_trace for target in self.targets.values()):
            if store is None:
                raise UserError(
                    f"the targets {', '.join(self.targets)} need traces: give traces.path (tools/extract.py makes them)"
                )
            store.require(sample.id for sample in samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        sample = self.samples[index]
        encoded = self.builder.encode(sample, sample.answer)
        if self.cache is not None:
            features = self.cache.features(encoded)
            grids = {key: value for key, value in encoded.vision.items() if key != "pixel_values"}
            encoded = replace(encoded, features=features, vision=grids)
        trace = self.store.get(sample.id) if self.store is not None and self.targets else None
        item = encoded, {name: target.prepare(encoded, trace) for name, target in self.targets.items()}
        if self._kept is not None:
            self._kept[index] = item
        return item

    @property
    def groups(self) -> list[Hashable]:
        """A key a sample; samples of one image share it (for batches that keep an image's questions together)."""
        return [sample.images for sample in self.samples]


@dataclass(frozen=True)
class Collate:
    """Items of an ``AlignedDataset`` -> ``{"batch": Batch}``, as the runner hands it to the model."""

    family: Any
    pad: int

    def __call__(self, items: Sequence[Item]) -> dict[str, Batch]:
        batch = collate([encoded for encoded, _ in items], self.family, self.pad)
        batch.targets = {name: stack([prepared[name] for _, prepared in items]) for name in items[0][1]}
        return {"batch": batch}


def select(samples: Sequence[Sample], store: TraceStore | None, filters: Sequence[str]) -> Sequence[Sample]:
    """The samples that pass every named filter's verdict.

    Raises:
        UserError: filters are named without a store, or the store holds no such verdicts.
    """
    if not filters:
        return samples
    if store is None:
        raise UserError(f"traces.select names {', '.join(filters)}, but traces.path is not given")
    passed = set(store.select(filters))
    return [sample for sample in samples if sample.id in passed]
