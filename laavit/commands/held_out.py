"""What a run looks at and does not train on (train.probe_every): the recipe's data with another file or split."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from laavit.data.aligned import AlignedDataset, Collate, Subset, ids_of
from laavit.registry import DATASETS, UserError
from laavit.structures import Sample
from laavit.targets.base import Target
from laavit.traces.hub import local_store
from laavit.traces.store import TraceStore

if TYPE_CHECKING:
    from laavit.engine.probe import Probe
    from laavit.engine.settings import TrainSettings
    from laavit.recipe import Recipe

logger = logging.getLogger(__name__)


def held_out(recipe: Recipe, settings: TrainSettings, trained: Sequence[Sample]) -> Sequence[Sample]:
    """The probe's samples.

    Raises:
        UserError: nothing says which, the reader does not know the setting, or some are trained on.
    """
    given = {"annotations": settings.probe_annotations, "split": settings.probe_split}
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        raise UserError(
            "train.probe_every looks at samples that are not trained on: say which by train.probe_split, "
            "train.probe_annotations, or both"
        )
    arguments = recipe.arguments("data")
    unknown = [name for name in changes if name not in arguments]
    if unknown:
        raise UserError(
            f"train.probe_{unknown[0]}: the data '{recipe.config['data']['type']}' has no setting '{unknown[0]}'"
        )
    found = DATASETS.find(recipe.config["data"]["type"])(**{**arguments, **changes})
    chosen = Subset(found, range(min(len(found), settings.probe_samples)))
    both = set(chosen.ids) & set(ids_of(trained))
    if both:
        raise UserError(
            f"train.probe_every: {len(both)} of {len(chosen)} probe samples are trained on, one is '{min(both)}'; "
            "choose another train.probe_split or train.probe_annotations"
        )
    return chosen


def usable_targets(
    targets: Mapping[str, Any], samples: Sequence[Sample], store: TraceStore | None
) -> dict[str, Target]:
    """The targets that can be worked out on the probe: they have boxes and traces there, of the run's store."""
    traced = store is not None and all(key in store for key in ids_of(samples))
    boxed = all(sample.boxes for sample in samples) if any(t.needs_boxes for t in targets.values()) else True
    found = {
        name: target
        for name, target in targets.items()
        if (not target.needs_trace or (traced and target.store is None)) and (boxed or not target.needs_boxes)
    }
    missing = [name for name in targets if name not in found]
    if missing:
        logger.info("the probe leaves out the targets %s: its samples have no traces or boxes", ", ".join(missing))
    return found


def probe_of(
    settings: TrainSettings,
    samples: Sequence[Sample],
    model: Any,
    dataset: AlignedDataset,
    store: TraceStore | None,
    collate: Collate,
) -> Probe:
    """What a run looks at, encoded as its own samples are.

    Args:
        samples: of ``held_out``. model: of the run. dataset: the one trained on. store: the run's traces.
        collate: of the run.

    Raises:
        UserError: the probe's traces are of another teacher, or a target has the name of a figure.
    """
    from laavit.engine.probe import IN_BOX, Probe, in_box_share

    if settings.probe_traces is not None:
        own = TraceStore(local_store(settings.probe_traces))
        if store is not None:
            own.check({"teacher": store.header.get("teacher"), "width": store.header["width"]})
        store = own
    if IN_BOX in model.named_targets:
        raise UserError(f"targets.{IN_BOX}: train.probe_every logs a figure of that name; call the target otherwise")
    targets = usable_targets(model.named_targets, samples, store)
    backbone = model.student.backbone
    looking = {**targets, IN_BOX: in_box_share(model.named_targets, model.student.latents, backbone.depth)}
    aligned = AlignedDataset(samples, dataset.builder, looking, store, dataset.cache)
    return Probe(aligned, collate, max(1, settings.batch_size // settings.accumulate), looking)
