"""Samples beside their traces: what a training step reads, worked out once a sample, in data workers."""

from __future__ import annotations

import logging
from collections import OrderedDict
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
from laavit.data.lengths import estimated
from laavit.registry import SETTINGS, UserError
from laavit.structures import Batch, Encoded, Sample, Trace
from laavit.targets.base import Target, stack
from laavit.targets.controls import PAIRED, partners
from laavit.targets.steps import hop_boxes
from laavit.traces.hub import local_store
from laavit.traces.shards import read_header
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


#: encodings that runs of one process share (a sweep trains the same samples again and again), the newest few
_ENCODED: OrderedDict[Hashable, dict[int, Encoded]] = OrderedDict()
SETS = 3


def encodings(key: Hashable) -> dict[int, Encoded]:
    """What has been encoded in this process under a key, by place; the last ``SETS`` keys are remembered.

    Args:
        key: all that an encoding depends on: samples, sequence builder, image features.
    """
    _ENCODED[key] = _ENCODED.pop(key, {})
    while len(_ENCODED) > SETS:
        _ENCODED.popitem(last=False)
    return _ENCODED[key]


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


def header_of(path: str) -> dict[str, Any]:
    """The header of the trace store that a target names for itself.

    Raises:
        UserError: there is none.
    """
    found = read_header(local_store(path))
    if found is None:
        raise UserError(f"there is no trace store at '{path}'")
    return found.content


class AlignedDataset(Dataset[Item]):
    """Encoded samples with what each target prepared for them.

    Args:
        samples: the samples to train on. builder: makes their sequences. targets: by name.
        store: traces; needed when a target needs them and names no store of its own.
        cache: features of a frozen vision tower, or None.
        keep: keep encoded samples in memory (small data sets; with cached features a sample costs a few kB).
        encoded: with ``keep``, where to keep them: what ``encodings`` gives, or None for a place of its own.

    Raises:
        UserError: before the first step, when a sample's trace or box is missing, the data set is too uniform for a
            target's control, or the family takes no cached features.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        builder: SequenceBuilder,
        targets: Mapping[str, Target] | None = None,
        store: TraceStore | None = None,
        cache: VisionCache | None = None,
        keep: bool = False,
        encoded: dict[int, Encoded] | None = None,
    ) -> None:
        self.samples, self.builder, self.targets = samples, builder, dict(targets or {})
        self.cache = cache
        self._kept: dict[int, Item] | None = {} if keep else None
        self._encoded = encoded if keep and encoded is not None else {}
        if not len(samples):
            raise UserError(NOTHING)
        self.stores = self._open_stores(store)
        self._check_boxes()
        self._partners = self._find_partners()
        if cache is not None and not cache.backbone.family.takes_features:
            raise UserError(
                f"traces.vision_cache: the family {type(cache.backbone.family).__name__} takes no cached image features"
            )

    def _open_stores(self, shared: TraceStore | None) -> dict[str, TraceStore]:
        """The store of every target that needs traces, with a trace of every sample."""
        opened: dict[str | None, TraceStore | None] = {None: shared}
        found: dict[str, TraceStore] = {}
        for name, target in self.targets.items():
            if not target.needs_trace:
                continue
            if target.store not in opened:
                assert target.store is not None, "the shared store is there from the beginning"
                opened[target.store] = TraceStore(local_store(target.store))
            store = opened[target.store]
            if store is None:
                wanting = [key for key, each in self.targets.items() if each.needs_trace and each.store is None]
                raise UserError(
                    f"the targets {', '.join(wanting)} need traces: give traces.path (tools/extract.py makes them)"
                )
            if all(store is not other for other in found.values()):
                store.require(ids_of(self.samples))
            found[name] = store
        return found

    def _check_boxes(self) -> None:
        """Whether every sample has a box, and says in which order boxes are looked at, where a target needs that."""
        wanting = [name for name, target in self.targets.items() if target.needs_boxes]
        if not wanting:
            return
        places = track(range(len(self.samples)), "boxes", console=Console(stderr=True), transient=True)
        without = [place for place in places if not self.samples[place].boxes]
        if without:
            raise UserError(
                f"targets.{wanting[0]}: {len(without)} of {len(self.samples)} samples have no box, the first is "
                f"'{self.samples[without[0]].id}'"
            )
        ordering = [name for name in wanting if self.targets[name].needs_hops]
        for sample in track(self.samples, "hops", console=Console(stderr=True), transient=True) if ordering else ():
            try:
                hop_boxes(sample)
            except UserError as error:
                raise UserError(f"targets.{ordering[0]}: {error}") from None

    def _find_partners(self) -> dict[str, np.ndarray]:
        """Under a control with partners, by target: the place of the sample whose trace and boxes each sample gets."""
        found = {}
        for name, target in self.targets.items():
            if target.control in PAIRED:
                try:
                    found[name] = partners(target.control, image_keys_of(self.samples), target.seed)
                except UserError as error:
                    raise UserError(f"targets.{name}: {error}") from None
        return found

    @property
    def keeps(self) -> bool:
        """Whether a sample that was encoded once stays in memory."""
        return self._kept is not None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        encoded = self._encoded[index] if index in self._encoded else self._encode(self.samples[index])
        read: dict[tuple[int, str], Trace] = {}  # a trace that several targets need is decoded once
        item = encoded, {name: self._prepared(name, index, encoded, read) for name in self.targets}
        if self._kept is not None:
            self._kept[index], self._encoded[index] = item, encoded
        return item

    def _encode(self, sample: Sample) -> Encoded:
        encoded = self.builder.encode(sample, sample.answer)
        if self.cache is None or not encoded.vision:
            return encoded
        grids = {key: value for key, value in encoded.vision.items() if key != "pixel_values"}
        return replace(encoded, features=self.cache.features(encoded), vision=grids)

    def _prepared(
        self, name: str, index: int, encoded: Encoded, read: dict[tuple[int, str], Trace]
    ) -> dict[str, Tensor]:
        """What one target prepares for a sample: from its own trace and boxes, or from its partner's."""
        target, owner = self.targets[name], encoded.sample
        if name in self._partners:
            owner = self.samples[int(self._partners[name][index])]
            # The meta comes along, since it says in which order the boxes are looked at.
            encoded = replace(encoded, sample=replace(encoded.sample, boxes=owner.boxes, meta=owner.meta))
        if name not in self.stores:
            return target.prepare(encoded, None)
        store = self.stores[name]
        key = id(store), owner.id
        if key not in read:
            read[key] = store.get(owner.id)
        return target.prepare(encoded, read[key])

    def lengths(self, places: Sequence[int]) -> np.ndarray:
        """About how many tokens samples have, int64 [n, 2]: see ``laavit.data.lengths``."""
        return estimated(self.samples, self.builder, places)

    @property
    def groups(self) -> Sequence[Hashable]:
        """A key a sample; samples of one image share it (for batches that keep an image's questions together).

        A sample without images shares its key with none.
        """
        return [key or place for place, key in enumerate(image_keys_of(self.samples))]


@dataclass(frozen=True)
class Collate:
    """Items of an ``AlignedDataset`` -> ``{"batch": Batch}``, as the runner hands it to the model.

    Args:
        family: the student's. pad: its padding token. share: read what samples of a batch begin with alike once.
        pack: have the decoder read a batch as one row without padding.
    """

    family: Any
    pad: int
    share: bool = False
    pack: bool = False

    def __call__(self, items: Sequence[Item]) -> dict[str, Batch]:
        batch = collate([encoded for encoded, _ in items], self.family, self.pad, self.share, self.pack)
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
