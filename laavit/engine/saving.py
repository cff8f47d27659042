"""How a checkpoint is written: by all processes together, atomically, again when the disk is full, in the background.

A checkpoint gets its name by one rename in process 0, after every process has told that its part is on the disk.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from laavit.engine.checkpoint import FORMATS, OPTIMIZER, RANDOM, STATE, Progress, folder_name, latest_checkpoint, tidy
from laavit.engine.distributed import rank_and_world
from laavit.engine.settings import TrainingStopped, TrainSettings
from laavit.engine.sharded import SHARDS, write_shards
from laavit.files import TEMPORARY, remove_leftovers, remove_tree, sync_entry, sync_tree, write_json

logger = logging.getLogger("laavit.engine")

#: seconds before a failed write is tried again: doubled up to the second figure
PAUSES = (1.0, 30.0)
#: that processes wait for the one that writes; that nothing moves is others' matter (train.stall_minutes)
LONGEST = timedelta(days=1)


class WriteFailed(Exception):
    """A process could not write: raised in all of them, with what it said."""


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment: what a checkpoint is made of.

    Args:
        progress: all but the weights; of a sharded checkpoint also without the optimizer's state.
        weights: the model's ``state_dict``, whole and on the CPU; None asks the model itself.
        shards: of a sharded checkpoint, weights and optimizer's state under their names there, else None.
    """

    progress: Progress
    weights: dict[str, Tensor] | None = None
    shards: dict[str, Tensor] | None = None


class Saver:
    """Writes snapshots; every process has one, and they are called together.

    Args:
        work_dir: the run's folder, the same for all processes.
        model: ``save_checkpoint(folder)`` or ``save_checkpoint(folder, state)``, and ``save_processor(folder)``.
    """

    def __init__(self, work_dir: Path, model: Any, settings: TrainSettings) -> None:
        self.work_dir, self.root, self.model, self.settings = work_dir, work_dir / "checkpoints", model, settings
        self.rank, _ = rank_and_world()
        # A group of its own: what the background thread says must not mix with what the training processes say.
        # Who writes a large checkpoint to a slow disk takes longer than the half an hour that gloo would wait.
        self.group: Any = dist.new_group(timeout=LONGEST, backend="gloo") if dist.is_initialized() else None
        self.thread = ThreadPoolExecutor(1, "checkpoint") if settings.checkpoint_async else None
        self.pending: Future[None] | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot; in the background where settings say so, then it must be of copies. Call ``wait`` before.

        Raises:
            TrainingStopped: it could not be written.
        """
        if self.thread is None:
            self._write(snapshot)
            return
        assert self.pending is None, "at most one snapshot is being written"
        self.pending = self.thread.submit(self._write, snapshot)

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            TrainingStopped: what was being written could not be.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, however the run ends; a failure is told in the log, since another one may be on its way."""
        try:
            self.wait()
        except TrainingStopped as error:
            logger.error("%s", error)
        if self.thread is not None:
            self.thread.shutdown()

    def _write(self, snapshot: Snapshot) -> None:
        step, waited, pause = snapshot.progress.step, 0.0, PAUSES[0]
        while True:
            try:
                self._attempt(snapshot)
                return
            except WriteFailed as error:  # in all processes: they wait the same times, and try again together
                if waited >= self.settings.disk_retry_s:
                    raise self._stopped(step, error) from error
                pause = min(pause, self.settings.disk_retry_s - waited)
                if self.rank == 0:
                    logger.warning(
                        "the checkpoint of step %d could not be written to '%s' (%s): make room; trying again in %g s, "
                        "giving up in %g s", *(step, self.root, error, pause, self.settings.disk_retry_s - waited)
                    )  # fmt: skip
                time.sleep(pause)
                waited, pause = waited + pause, min(2 * pause, PAUSES[1])

    def _stopped(self, step: int, error: WriteFailed) -> TrainingStopped:
        before = latest_checkpoint(self.work_dir)
        return TrainingStopped(
            f"the checkpoint of step {step} could not be written to '{self.root}' ({error}); "
            + (f"the last complete one is '{before}': " if before else "there is no earlier one: ")
            + "make room, then run again with --resume"
        )

    def _attempt(self, snapshot: Snapshot) -> None:
        """Write a snapshot once.

        Raises:
            WriteFailed: in every process; the former checkpoints are intact.
        """
        final = self.root / folder_name(snapshot.progress.step)
        beside = self.root / f"{TEMPORARY}{final.name}"
        try:
            for part in (self._begin, self._fill, self._publish):
                self._together(partial(part, snapshot, beside, final))
        except WriteFailed:
            if self.rank == 0:
                _clean_up(self.root)
            raise
        if self.rank == 0:
            tidy(self.work_dir, self.settings.keep_last, self.settings.keep_best)

    def _begin(self, snapshot: Snapshot, beside: Path, final: Path) -> None:
        if self.rank == 0:
            remove_tree(beside)
            beside.mkdir(parents=True)

    def _fill(self, snapshot: Snapshot, beside: Path, final: Path) -> None:
        if snapshot.shards is not None:
            write_shards(beside / SHARDS, snapshot.shards, self.group)
        if self.rank:
            return
        if snapshot.shards is not None:
            self.model.save_processor(beside)
        else:
            self.model.save_checkpoint(beside, *([] if snapshot.weights is None else [dict(snapshot.weights)]))
            save_file(snapshot.progress.optimizer, beside / OPTIMIZER)
        save_file(snapshot.progress.random, beside / RANDOM)

    def _publish(self, snapshot: Snapshot, beside: Path, final: Path) -> None:
        if self.rank:
            return
        files = {str(p.relative_to(beside)): p.stat().st_size for p in sorted(beside.rglob("*")) if p.is_file()}
        kind = FORMATS["consolidated" if snapshot.shards is None else "sharded"]
        state = {"format": kind, "iter": snapshot.progress.step, **snapshot.progress.state, "files": files}
        write_json(beside / STATE, state)
        sync_tree(beside)
        remove_tree(final)  # one of the same step, from a run that was resumed further back
        os.replace(beside, final)
        sync_entry(self.root)

    def _together(self, work: Callable[[], None]) -> None:
        """Do a part of the work in every process; go on when all have done theirs.

        Raises:
            WriteFailed: in every process, when one could not.
        """
        told: list[str | None] = [None]
        try:
            work()
        except Exception as error:  # tokenizers raises nothing narrower for a full disk; all else goes on
            if not is_of_the_disk(error):
                raise
            told = [str(error)]
        if self.group is not None:
            own, told = told[0], [None] * dist.get_world_size()
            dist.all_gather_object(told, own, self.group)
        for failure in told:
            if failure is not None:
                raise WriteFailed(failure)


def is_of_the_disk(error: Exception) -> bool:
    """Whether an exception says that the system could not write, and not that the code is wrong.

    The tokenizers package, which writes ``tokenizer.json``, knows no class of its own for it.
    """
    return isinstance(error, OSError | SafetensorError) or (type(error) is Exception and "(os error " in str(error))


class Copies:
    """Copies of tensors in the CPU's memory (page-locked with a GPU, which makes them faster), used again each time."""

    def __init__(self, device: torch.device) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        cuda = device.type == "cuda"
        self.stager = DefaultStager(StagingOptions(cuda, False, False, cuda))

    def of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies that are finished when it returns; tied tensors stay one, sharded ones sharded."""
        copied: Any = self.stager.stage(tensors)
        return copied


def _clean_up(root: Path) -> None:
    """After a failed write, without hiding why it failed."""
    try:
        remove_leftovers(root)
    except OSError as error:
        logger.warning("could not clean up in %s: %s", root, error)
