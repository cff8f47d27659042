"""The extraction on Ray Data (``pip install laavit[ray]``): shard numbers go through a pool of actors with teachers.

The actors write into the same store, by the same shards and claims, as processes do (``engine.py``): an interrupted run
goes on in any mode, and the folder has to be one that all machines see. A dead actor's shard is given to another one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laavit.registry import UserError
from laavit.structures import Sample
from laavit.teachers.base import Teacher
from laavit.teachers.engine import ShardWorker, progress, quarantined, sample_ids, stopped_cleanly, store_header, undone
from laavit.teachers.plan import Plan, Share
from laavit.teachers.settings import ExtractSettings
from laavit.traces import shards
from laavit.traces.shards import Header

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What an actor needs; it travels to the actors, so that the teacher is loaded there and never here.

    Args:
        build: makes the teacher and the samples. settings, data: as ``extract``. out: the store, an absolute path.
        folder: where relative paths of the data and the teacher start.
    """

    build: Callable[[], tuple[Teacher, Sequence[Sample]]]
    settings: ExtractSettings
    out: Path
    data: Mapping[str, Any]
    folder: Path


class ShardActor:
    """Holds a teacher and writes the shards whose numbers it is given."""

    def __init__(self, work: Work) -> None:
        self.error = ""
        os.chdir(work.folder)
        try:
            teacher, samples = work.build()
            header = store_header(teacher.card(), work.settings, work.data)
            plan = Plan.open(work.out, sample_ids(samples), header, work.settings.shard_size)
            self.worker = ShardWorker(plan, teacher.extractor(work.settings), samples, work.settings, lambda _: None)
            self.work = work
        except UserError as error:  # told with the first shard: what an actor raises arrives as Ray's own error
            self.error = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Write one shard: ``{"id": [index], "again": [bool]}`` -> its index, whether it is done, what stopped it.

        ``again`` drops the shard first.
        """
        index, done = int(batch["id"][0]), False
        if not self.error:
            try:
                with stopped_cleanly(self.work.out, self.work.settings):
                    if batch["again"][0]:
                        shards.drop_shard(self.work.out, index)
                    done = self.worker(index)
            except UserError as error:
                self.error = str(error)
        return {"id": np.array([index]), "done": np.array([done]), "error": np.array([self.error], dtype=object)}


def extract_on_ray(
    work: Work, samples: Sequence[Sample], share: Share, retry: bool = False, actors: int = 0, gpus: float = 0
) -> Path:
    """``extract`` on a Ray cluster: the one that RAY_ADDRESS names, or one of this machine alone.

    Args:
        samples: those that ``work.build`` makes.
        actors: how many teachers; 0: one a GPU of the cluster (or one where it has none).
        gpus: GPUs of an actor; 0: one where the cluster has any.

    Raises:
        UserError: Ray is not installed, or as ``extract``.
    """
    with _cluster() as ray:
        there = ray.cluster_resources().get("GPU", 0)
        gpus = gpus or float(there > 0)
        actors = actors or max(1, int(there / gpus) if gpus else 1)
        logger.info("Ray: %d actors with %g GPUs each", actors, gpus)
        plan, todo = _todo(work, samples, share, retry)
        with progress(sum(len(plan.samples(index)) for index in todo), show=True) as advance:
            while todo:  # more than once only where other jobs have some of these shards in work
                for result in _run(ray, work, todo, min(actors, len(todo)), gpus):
                    if result["error"]:
                        raise UserError(str(result["error"]))
                    if result["done"]:
                        del todo[int(result["id"])]
                        advance(len(plan.samples(int(result["id"]))))
    return work.out


def _run(ray: Any, work: Work, todo: Mapping[int, bool], actors: int, gpus: float) -> Iterator[dict[str, Any]]:
    items = [{"id": index, "again": again} for index, again in todo.items()]
    numbers = ray.data.from_items(items, override_num_blocks=len(items))
    pool = ray.data.ActorPoolStrategy(size=actors)
    done = numbers.map_batches(
        ShardActor, fn_constructor_args=(work,), batch_size=1, num_gpus=gpus or None, compute=pool
    )
    yield from done.iter_rows()


def _todo(work: Work, samples: Sequence[Sample], share: Share, retry: bool) -> tuple[Plan, dict[int, bool]]:
    """The shards to be done -> whether they were done before.

    Settings and samples are compared with a store that is there already; the teacher is, by the first actor, before
    anything is written or dropped.
    """
    ids, found = sample_ids(samples), shards.read_header(work.out)
    if found is None:
        header = Header(work.settings.shard_size, len(ids), shards.ids_digest(ids), {})
        return (plan := Plan(work.out, ids, header)), dict.fromkeys(share.scope(plan.header.shards), False)
    content = found.content | store_header({}, work.settings, work.data)
    plan = Plan.open(work.out, ids, content, work.settings.shard_size)
    again = dict.fromkeys(quarantined(plan, share), True) if retry else {}
    return plan, dict.fromkeys(undone(plan, share), False) | again


@contextmanager
def _cluster() -> Iterator[Any]:
    # No usage statistics leave the machine unless the user has asked for them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(f"Ray is not installed ({error}); pip install 'laavit[ray]'") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the bar here says it all
    begun = not ray.is_initialized()
    if begun:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield ray
    finally:
        if begun:
            ray.shutdown()
