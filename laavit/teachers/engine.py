"""The extraction: samples through any teacher into the shards of a store, by one process or by many.

Every process that is given the same data and settings works at the same store: the ranks of ``torchrun``, independent
jobs (``--part 2/3``), or Ray's actors (``ray_engine.py``). A shard is done by one of them at a time, finished batches
are kept beside it, and what is done is never done again: a kill costs the batch in work. A sample that cannot be read
is put aside with its reason; anything else stops the run in one sentence, and the same command goes on.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from laavit import __version__
from laavit.registry import UserError
from laavit.structures import Sample, Trace
from laavit.teachers.base import Extractor, SampleError, Teacher
from laavit.teachers.loading import Prepared, by_pixels, prepared
from laavit.teachers.plan import Plan, Share
from laavit.teachers.settings import ExtractSettings
from laavit.traces import shards
from laavit.traces.schema import Row, encode, storage, trace_features
from laavit.traces.shards import Record

logger = logging.getLogger(__name__)

POLL = 0.2  # seconds between two looks at a shard that another process writes


def store_header(card: Mapping[str, Any], settings: ExtractSettings, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a store says about itself; a run or a recipe whose settings differ from it is refused.

    Args:
        card: the teacher's; its tokenizer matters where answer logits are kept.
    """
    return {
        **{key: value for key, value in card.items() if key != "tokenizer_sha256" or settings.logits},
        "laavit": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "gaze_top_k": settings.gaze_top_k,
        "semantics_dtype": settings.semantics_dtype,
        "settings": settings.card(),
        "data": dict(data),
    }


def sample_ids(samples: Sequence[Sample]) -> Sequence[str]:
    """All ids in order, without opening an image where the data know them."""
    ids = getattr(samples, "ids", None)
    return tuple(ids) if ids is not None else tuple(sample.id for sample in samples)


def extract(
    teacher: Teacher,
    samples: Sequence[Sample],
    settings: ExtractSettings,
    out: Path,
    data: Mapping[str, Any],
    share: Share | None = None,
    retry: bool = False,
) -> Path:
    """Write the traces of a share of the samples into a store, going on where an earlier run stopped.

    Rank 0 returns when its whole part is done, the other ranks when nothing is left for them.

    Args:
        samples: in a fixed order, which the shards follow; one that cannot be opened (``UserError``) is put aside.
        out: the store's folder. data: what the header says of the data.
        share: which shards this process takes; None: all.
        retry: do those shards again that have samples put aside.

    Raises:
        UserError: the store is another one's; every sample of the first shard was put aside; a trace is not finite;
            memory or disk ran out. Finished work is kept.
    """
    share = share or Share()
    with stopped_cleanly(out, settings):
        plan = Plan.open(out, sample_ids(samples), store_header(teacher.card(), settings, data), settings.shard_size)
        todo = undone(plan, share, retry)
        left = sum(len(plan.samples(index)) for index in todo)
        with progress(left, show=share.rank == 0) as advance:
            worker = ShardWorker(plan, teacher.extractor(settings), samples, settings, advance)
            while todo:
                todo = [index for index in todo if not worker(index)]
                if not todo or share.rank:  # another rank's shard is that rank's to finish; rank 0 sees to all
                    break
                time.sleep(POLL)
    return out


def undone(plan: Plan, share: Share, retry: bool = False) -> list[int]:
    """The shards of a share that have to be done; with ``retry`` those too that have samples put aside."""
    if retry:
        for index in quarantined(plan, share):
            shards.drop_shard(plan.folder, index)
    states = {index: plan.state(index) for index in share.scope(plan.header.shards)}
    for index, state in states.items():
        if isinstance(state, Record):
            plan.clean(index)
        elif state != "missing":
            logger.warning("%s is done again: %s", shards.shard_path(plan.folder, index).name, state)
    todo = [index for index, state in states.items() if not isinstance(state, Record)]
    left, total = (sum(len(plan.samples(index)) for index in indices) for indices in (todo, states))
    logger.info("%d of %d samples are done already", total - left, total)
    return todo


def quarantined(plan: Plan, share: Share) -> list[int]:
    """The share's shards that have samples put aside.

    Raises:
        UserError: several processes share the work: one would drop what another has done again.
    """
    if share.ranks > 1:
        raise UserError("--retry is for one process a part: the ranks of torchrun would undo each other's work")
    records = {index: plan.state(index, verify=False) for index in share.scope(plan.header.shards)}
    found = {index: record.quarantined for index, record in records.items() if isinstance(record, Record)}
    logger.info("%d samples that were put aside are tried again", sum(map(len, found.values())))
    return [index for index, aside in found.items() if aside]


class ShardWorker:
    """Writes shards, one a call.

    Args:
        plan: the store's. extractor: the teacher's. samples: all of them. settings: what is read, and how many at once.
        advance: called with the number of samples that are done.
    """

    def __init__(
        self,
        plan: Plan,
        extractor: Extractor,
        samples: Sequence[Sample],
        settings: ExtractSettings,
        advance: Callable[[int], object],
    ) -> None:
        self.plan, self.extractor, self.samples, self.settings, self.advance = (
            plan,
            extractor,
            samples,
            settings,
            advance,
        )
        self.storing = storage(plan.header.content)
        self.features = trace_features(*self.storing[1:])

    def __call__(self, index: int) -> bool:
        """Whether the shard is done, by this process or by another; False where another one has it in work."""
        with self.plan.claim(index) as mine:
            if not mine:
                return False
            record = self.plan.state(index)
            if isinstance(record, Record):
                self.advance(len(self.plan.samples(index)))
            else:
                begin = time.monotonic()
                record = self._write(index)
                seconds, count = time.monotonic() - begin, len(self.plan.samples(index))
                aside = f", {len(record.quarantined)} of them put aside" if record.quarantined else ""
                rate = count / max(seconds, 1e-9)
                logger.info("shard %d: %d samples%s, %.1f a second", index, count, aside, rate)
            self.plan.clean(index)
        return True

    def _write(self, index: int) -> Record:
        aside: dict[str, str] = {}
        readable = []
        for place in self.plan.samples(index):
            try:
                readable.append(self.samples[place])
            except UserError as error:
                aside[self.plan.ids[place]] = str(error)
        self.advance(len(aside))
        rows: dict[str, Row] = {}
        for batch, quarantined in self._batches(index, readable):
            rows.update((row["sample_id"], row) for row in batch)
            aside.update(quarantined)
        self._check(index, rows, aside)
        places = self.plan.samples(index)
        ordered = [rows[key] for key in self.plan.ids[places.start : places.stop] if key in rows]
        return shards.write_shard(self.plan.folder, index, ordered, self.features, self.plan.digest(index), aside)

    def _batches(self, index: int, samples: Sequence[Sample]) -> Iterator[tuple[list[Row], dict[str, str]]]:
        """Rows and quarantined samples of every batch; finished ones are read from the spool, itself a little store."""
        spool = self.plan.spool(index)
        batches = by_pixels(samples, self.settings.batch_size)
        digests = [shards.ids_digest(sample.id for sample in batch) for batch in batches]
        todo = []
        for number, digest in enumerate(digests):
            record = shards.read_record(spool, number)
            if isinstance(record, Record) and record.samples == digest:
                self.advance(len(batches[number]))
                yield shards.read_rows(shards.shard_path(spool, number)), record.quarantined
            else:
                todo.append(number)
        ready = prepared(self.extractor.preparer, [batches[number] for number in todo], self.settings.workers)
        for number, items in zip(todo, ready, strict=True):
            rows, quarantined = self._record(items)
            shards.write_shard(spool, number, rows, self.features, digests[number], quarantined, sync=False)
            self.advance(len(items))
            yield rows, quarantined

    def _record(self, items: Sequence[Prepared]) -> tuple[list[Row], dict[str, str]]:
        aside = {item.sample_id: item.reason for item in items if item.reason is not None}
        good = [item for item in items if item.reason is None]
        traces: list[Trace] | None = None if good else []
        while traces is None:
            try:
                traces = self.extractor([item.value for item in good])
            except SampleError as error:
                aside[error.sample_id] = str(error)
                good = [item for item in good if item.sample_id != error.sample_id]
                traces = None if good else []
        if [trace.sample_id for trace in traces] != [item.sample_id for item in good]:
            raise ValueError(f"{type(self.extractor).__name__} gave traces of other samples than it was asked for")
        rows = []
        for trace in traces:
            try:
                rows.append(encode(trace, *self.storing))
            except UserError as error:  # its figures do not fit the store's types
                aside[trace.sample_id] = str(error)
        return rows, aside

    def _check(self, index: int, rows: Mapping[str, Row], aside: Mapping[str, str]) -> None:
        """A whole shard put aside before any trace was made is no matter of single samples."""
        samples = self.plan.samples(index)
        whole = len(samples) == min(self.plan.header.shard_size, len(self.plan.ids))
        if aside and not rows and whole and not shards.shard_indices(self.plan.folder):
            reason, count = Counter(aside.values()).most_common(1)[0]
            raise UserError(
                f"none of the first {len(samples)} samples can be read; {count} of them, for example "
                f"'{next(key for key in aside if aside[key] == reason)}': {reason}"
            )


@contextmanager
def stopped_cleanly(out: Path, settings: ExtractSettings) -> Iterator[None]:
    """What is no sample's fault, in one sentence; finished shards and batches stay."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"memory ran out with extract.batch_size {settings.batch_size}: begin a new store with a smaller one, or "
            f"with a smaller teacher.max_pixels ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk of '{out}' is full; what is finished is kept, and the same command goes on"
        ) from error


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.1f} samples/s")


@contextmanager
def progress(total: int, show: bool) -> Iterator[Callable[[int], object]]:
    """A bar with rate and remaining time; gives what is called with the number of samples that are done."""
    columns = (
        TextColumn("extracting"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show, speed_estimate_period=300) as bar:
        task = bar.add_task("extracting", total=total)
        yield lambda count: bar.advance(task, count)
