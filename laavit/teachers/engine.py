"""The extraction: samples in order, through any teacher, into a store that an interrupted run goes on with."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from laavit import __version__
from laavit.structures import Sample
from laavit.teachers.base import Teacher
from laavit.teachers.settings import ExtractSettings
from laavit.traces.store import TraceWriter

logger = logging.getLogger(__name__)


def store_header(teacher: Teacher, settings: ExtractSettings, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a store says about itself; a recipe whose settings differ from it is refused."""
    return {
        "laavit": __version__,
        **teacher.card(),
        "gaze_top_k": settings.gaze_top_k,
        "settings": settings.card(),
        "data": dict(data),
    }


def extract(
    teacher: Teacher, samples: Sequence[Sample], settings: ExtractSettings, out: Path, data: Mapping[str, Any]
) -> Path:
    """Write the traces of all samples into a store, going on where an earlier run stopped.

    Args:
        samples: in a fixed order, which the shards follow. out: the store's folder.
        data: what the header says of the data.
    """
    writer = TraceWriter(out, store_header(teacher, settings, data), settings.shard_size)
    extractor = teacher.extractor(settings)
    todo = [sample for sample in samples if sample.id not in writer.done]
    logger.info("%d of %d samples have a trace already", len(samples) - len(todo), len(samples))
    with writer:
        for batch in _progress(todo, settings.batch_size):
            # All of a batch or nothing: a rest would be batched differently when resumed, to other bits.
            writer.extend(extractor([extractor.preparer(sample) for sample in batch]))
    return out


def _progress(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    columns = (TextColumn("extracting"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("extracting", total=len(samples))
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            yield batch
            bar.advance(task, len(batch))
