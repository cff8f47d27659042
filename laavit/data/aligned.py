"""Samples beside their traces: what a training step reads, worked out once a sample, in data workers."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from laavit.backbones.base import collate
from laavit.backbones.chat import SequenceBuilder
from laavit.backbones.vision_cache import VisionCache
from laavit.registry import SETTINGS, UserError
from laavit.structures import Batch, Encoded, Sample
from laavit.targets.base import Target, stack
from laavit.traces.store import TraceStore

logger = logging.getLogger(__name__)


@SETTINGS.register_module(name="traces")
@dataclass(frozen=True)
class TraceSettings:
    """Which traces a run trains on.

    Args:
        path: the trace store's folder, or hf://datasets/NAME/REPOSITORY; None for a run that needs none.
        select: filters whose verdict a sample must pass (each is a column of the store).
        vision_cache: folder for the features of a frozen vision tower; None works them out every time.
        keep: keep encoded samples in memory (small data sets; with cached features a sample costs a few kB).
    """

    path: str | None = None
    select: tuple[str, ...] = ()
    vision_cache: str | None = None
    keep: bool = False


NOTHING = "there is no sample to train on: the data set is empty, or no sample passes the selected filters"
Item = tuple[Encoded, dict[str, dict[str, Tensor]]]


def ids_of(samples: Sequence[Sample]) -> Sequence[str]:
    """Every sample's id, in order; a reader that has ``ids`` is not asked for its samples (and their image files)."""
    known: Sequence[str] | None = getattr(samples, "ids", None)
    return known if known is not None else [sample.id for sample in samples]


def image_keys_of(samples: Sequence[Sample]) -> Sequence[Hashable]:
    """What names the images of every sample, in order; from the reader's ``image_keys`` where it has them."""
    known: Sequence[Hashable] | None = getattr(samples, "image_keys", None)
    return known if known is not None else [sample.images for sample in samples]


class Subset(Sequence[Sample]):
    """Some samples of a data set, by their places; a sample is read when it is asked for, and not before.

    Args:
        samples: the whole. places: indices into it, in order (kept as one array, 8 bytes a sample).
    """

    def __init__(self, samples: Sequence[Sample], places: Sequence[int]) -> None:
        self.samples, self.places = samples, np.asarray(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.samples[int(place)] for place in self.places[index]]
        return self.samples[int(self.places[index])]

    @property
    def ids(self) -> list[str]:
        """The samples' ids in order."""
        known = ids_of(self.samples)
        return [known[place] for place in self.places]

    @property
    def image_keys(self) -> list[Hashable]:
        """What names the images of every sample, in order."""
        known = image_keys_of(self.samples)
        return [known[place] for place in self.places]

    def check(self) -> None:
        """Look at every sample's image files and boxes once, so that a run does not stop at a late one.

        Raises:
            UserError: the first sample that is not as it must be.
        """
        for place in track(self.places, "images", console=Console(stderr=True), transient=True):
            self.samples[int(place)]


class AlignedDataset(Dataset[Item]):
    """Encoded samples with what each target prepared for them.

    Args:
        samples: the samples to train on. builder: makes their sequences. targets: by name.
        store: traces; needed when a target needs them. cache: features of a frozen vision tower, or None.
        keep: keep encoded samples in memory (small data sets; with cached features a sample costs a few kB).

    Raises:
        UserError: before the first step, when a sample's trace is missing, or the family takes no cached features.
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
            raise UserError(NOTHING)
        self._needs_trace = any(target.needs_trace for target in self.targets.values())
        if self._needs_trace:
            if store is None:
                raise UserError(
                    f"the targets {', '.join(self.targets)} need traces: give traces.path (tools/extract.py makes them)"
                )
            store.require(ids_of(samples))
        if cache is not None and not cache.backbone.family.takes_features:
            raise UserError(
                f"traces.vision_cache: the family {type(cache.backbone.family).__name__} takes no cached image features"
            )

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
        trace = self.store.get(sample.id) if self.store is not None and self._needs_trace else None
        item = encoded, {name: target.prepare(encoded, trace) for name, target in self.targets.items()}
        if self._kept is not None:
            self._kept[index] = item
        return item

    @property
    def groups(self) -> Sequence[Hashable]:
        """A key a sample; samples of one image share it (for batches that keep an image's questions together)."""
        return image_keys_of(self.samples)


@dataclass(frozen=True)
class Collate:
    """Items of an ``AlignedDataset`` -> ``{"batch": Batch}``, as the runner hands it to the model."""

    family: Any
    pad: int

    def __call__(self, items: Sequence[Item]) -> dict[str, Batch]:
        batch = collate([encoded for encoded, _ in items], self.family, self.pad)
        batch.targets = {name: stack([prepared[name] for _, prepared in items]) for name in items[0][1]}
        return {"batch": batch}


def select(samples: Sequence[Sample], store: TraceStore | None, filters: Sequence[str] = ()) -> Sequence[Sample]:
    """The samples that have a trace and pass every named filter's verdict; by their ids, without opening an image.

    What the extraction put aside (``TraceStore.quarantined``) is left out with a warning.

    Raises:
        UserError: filters are named without a store, the store holds no such verdicts, or it lacks a sample's trace.
    """
    if store is None:
        if filters:
            raise UserError(f"traces.select names {', '.join(filters)}, but traces.path is not given")
        return samples
    ids = ids_of(samples)
    # Before anything is selected: a sample without a trace is missing, not filtered out.
    store.require(key for key in ids if key not in store.quarantined)
    passed = set(store.select(filters)) if filters else store
    places = [place for place, key in enumerate(ids) if key in passed]
    if not places:
        raise UserError(NOTHING)
    aside = sum(key in store.quarantined for key in ids) if store.quarantined else 0
    if aside:
        logger.warning("%d of %d samples were put aside by the extraction and are left out", aside, len(ids))
    return samples if len(places) == len(ids) else Subset(samples, places)
