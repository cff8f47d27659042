"""``train``: a model, a data set and settings in, a folder of checkpoints out, by mmengine's Runner."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import Tensor, nn
from torch.utils.data import Dataset

from laavit.engine.buckets import sample_lengths
from laavit.engine.checkpoint import latest_checkpoint
from laavit.engine.distributed import any_process, pick_device, process_group, rank_and_world
from laavit.engine.environment import describe
from laavit.engine.hooks import (
    CheckpointHook,
    DataWaitHook,
    LogHook,
    ProgressHook,
    StepHook,
    guards,
    writers,
)
from laavit.engine.hooks.log import FILE, truncate_log
from laavit.engine.hooks.probe import ProbeHook
from laavit.engine.kernels import use_kernels
from laavit.engine.loader import build_loader
from laavit.engine.lock import only_run
from laavit.engine.loop import StepLoop
from laavit.engine.memory import told_out_of_memory
from laavit.engine.optim import StepOptimWrapper, build_adamw, unique_parameters
from laavit.engine.resuming import FROZEN, check_resumable, frozen_digest, load_weights, restorer, starting_point
from laavit.engine.sampler import BatchSampler
from laavit.engine.schedules import ClosedFormLR
from laavit.engine.settings import TrainSettings
from laavit.engine.strategies import Strategy, strategy_for
from laavit.engine.strategies.alike import check_alike, kept_alike
from laavit.files import read_object, write_json
from laavit.registry import UserError

logger = logging.getLogger("laavit.engine")

#: mmengine's default hooks that have one of ours in their place (its own sync the host for every figure of every step)
REPLACED = dict.fromkeys(("runtime_info", "timer", "sampler_seed", "logger", "checkpoint"))
#: what a recipe says of the model and its losses: a run that goes on with another one is told so
PARTS = ("student", "latents", "gate", "targets", "prompt")


class Trainable(Protocol):
    """What ``train`` asks of a model, beside being an ``mmengine.model.BaseModel``.

    A model may have ``counts(**batch)``, over how many things each of its losses is a mean, by name; its ``forward``
    then takes ``shares`` (laavit/engine/normalisation.py).
    """

    def set_step(self, step: int) -> None:
        """Told before every optimizer step, 0-based."""

    def trainable_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """What the optimizer moves, by name."""

    def save_checkpoint(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write weights (safetensors) and processor into an existing folder: its own, or those of a ``state_dict``."""

    def save_processor(self, folder: Path) -> None:
        """Write what ``save_checkpoint`` writes beside weights: what a sharded checkpoint needs to be complete."""

    def saved_bytes(self) -> int:
        """About what the weights that ``save_checkpoint`` writes take on the disk."""

    def load_checkpoint(self, folder: Path) -> None:
        """Read them back."""


class QuietRunner(Runner):
    """mmengine's Runner without its log files, environment dump and guesses about devices and weights.

    Args:
        restore: called where the Runner would load a checkpoint.
    """

    def __init__(self, *, restore: Callable[[QuietRunner], None] | None, **kwargs: Any) -> None:
        self._restore = restore
        super().__init__(**kwargs)

    def setup_env(self, env_cfg: dict) -> None:
        """The processes have met already; no time stamp, hence no folder of mmengine's own beside our files."""
        self._rank, self._world_size = rank_and_world()
        self._timestamp = ""

    def build_logger(self, log_level: int | str = "ERROR", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        """Console only, errors only: the run's own lines come from ``laavit.engine``."""
        return MMLogger.get_instance(name=self._experiment_name, log_level=log_level)

    def _log_env(self, env_cfg: dict) -> None:
        """Nothing: ``environment.json`` holds it (and mmengine starts compilers to find their versions)."""

    def dump_config(self) -> None:
        """Nothing: ``recipe.json`` holds it."""

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """The model comes wrapped and on its device."""
        return model

    def _init_model_weights(self) -> None:
        """Nothing: mmengine would call ``init_weights`` of the parts, which in a Hugging Face model draws them anew."""

    def load_or_resume(self) -> None:
        """Our checkpoints instead of mmengine's pickles."""
        if self._restore is not None:
            self._restore(self)


def train(
    model: BaseModel,
    dataset: Dataset,
    collate: Callable[[list], Any],
    settings: TrainSettings,
    work_dir: str | Path,
    recipe_dump: Mapping[str, Any],
    extra_environment: Mapping[str, Any] | None = None,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
    strategy: Strategy | None = None,
) -> Path:
    """Train a model and return its last checkpoint.

    Reads RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them. Writes ``recipe.json``, ``environment.json``,
    ``log.jsonl``, ``tensorboard/`` and ``checkpoints/iter_<steps>/`` into ``work_dir``. On the CPU, a run killed at
    any moment and resumed ends with the same bits as an uninterrupted one (same number of processes and threads).
    Afterwards the model holds the trained weights (with fsdp2: its share of them).

    Args:
        model: see :class:`Trainable`; ``forward(**collate(samples), mode='loss')`` gives tensors of which only
            ``loss`` has the word loss in its name.
        dataset: map-style; a sample is a pure function of its index. With ``settings.grouped`` it has ``groups``.
        collate: samples -> a dict of arguments for ``forward``; what it carries as ``samples`` (with an ``id`` each)
            is named when a loss is not finite.
        recipe_dump: the resolved recipe, plain data.
        extra_environment: plain data for ``environment.json``, for example hashes of data and weights.
        resume: go on from the newest complete checkpoint; without one, start anew.
        hooks: further mmengine hooks.
        strategy: how the model is spread over the processes; None: ``strategy_for``.

    Raises:
        UserError: the folder holds a run and ``resume`` is not set, or another process trains in it, or that run had
        other data, or a setting does not fit, or a strategy the number of processes. TrainingStopped: the loss is not
        finite, or a checkpoint cannot be written.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    work_dir = Path(work_dir).resolve()
    joins = strategy is not None and strategy.always_joins
    with process_group(device, joins, settings.stall_minutes), ExitStack() as held:
        rank, world_size = rank_and_world()
        strategy = strategy_for(strategy, world_size)
        strategy.check(settings, device, world_size)
        check_alike(strategy, settings, [dataset, *(h.probe.dataset for h in hooks if isinstance(h, ProbeHook))])
        sampler = _sampler(dataset, settings, rank, world_size, device)
        held.enter_context(only_run(work_dir))
        start_from = starting_point(work_dir, resume, rank, device)
        if start_from is not None:
            sampler.start = check_resumable(start_from, settings, sampler)
            load_weights(model, start_from)
        if rank == 0:
            environment = describe(device, world_size, settings.seed, extra_environment or {})
            _write_headers(work_dir, recipe_dump, {**environment, "resumed_at": sampler.start}, sampler.start)
        any_process(False, device)  # nobody reads the log before it is cut to the step that is resumed
        if start_from is None or sampler.start < settings.steps:
            more = (recipe_dump, sampler, device, start_from, hooks, strategy)
            _run(model, dataset, collate, settings, work_dir, *more)
        last = latest_checkpoint(work_dir)
    assert last is not None, "the last step always leaves a checkpoint, or raises"
    return last


def _sampler(dataset: Any, settings: TrainSettings, rank: int, world_size: int, device: torch.device) -> BatchSampler:
    groups = getattr(dataset, "groups", None) if settings.grouped else None
    if settings.grouped and groups is None:
        raise UserError(f"train.grouped: {type(dataset).__name__} has no 'groups'; set train.grouped=False")
    return BatchSampler(
        len(dataset),
        groups,
        batch_size=settings.batch_size,
        steps=settings.steps,
        seed=settings.seed,
        accumulate=settings.accumulate,
        rank=rank,
        world_size=world_size,
        lengths=sample_lengths(dataset, device) if settings.bucketing or settings.tokens else None,
        window=settings.bucketing,
        tokens=settings.tokens,
        shared=settings.shared_prefix and settings.grouped,
        packed=settings.packing == "pack",
    )


def _write_headers(work_dir: Path, recipe: Mapping[str, Any], environment: Mapping[str, Any], step: int) -> None:
    before, now = read_object(work_dir / "recipe.json"), json.loads(json.dumps(dict(recipe)))
    changed = [key for key in PARTS if step and key in before and before[key] != now.get(key)]
    if changed:
        logger.warning("from step %d on with another recipe, and not to the same bits: %s", step, ", ".join(changed))
    try:
        write_json(work_dir / "recipe.json", recipe)
        write_json(work_dir / "environment.json", environment)
        truncate_log(work_dir / FILE, step)
    except OSError as error:
        raise UserError(f"the run folder '{work_dir}' cannot be written: {error}") from None


def _run(
    model: Any,
    dataset: Any,
    collate: Callable[[list], Any],
    settings: TrainSettings,
    work_dir: Path,
    recipe: Mapping[str, Any],
    sampler: BatchSampler,
    device: torch.device,
    start_from: Path | None,
    hooks: Sequence[Hook],
    strategy: Strategy,
) -> None:
    """Build mmengine's Runner, run it, and undo what it leaves in the process."""
    rank, _ = rank_and_world()
    use_kernels(model, settings, device)
    about: dict[str, Any] = {"recipe": recipe, "data": {"fingerprint": sampler.fingerprint, "length": len(dataset)}}
    if settings.checkpoint_format == "sharded" and rank == 0 and hasattr(model, "student"):
        learned = {name for name, p in model.student.named_parameters() if p.requires_grad}
        about[FROZEN] = frozen_digest(model.student, learned)
    wrapped = strategy.wrap(model, settings, device)  # before the optimizer: it may make other parameters
    named = unique_parameters(model.trainable_parameters())
    wrapper = StepOptimWrapper(
        build_adamw(named, settings),
        accumulate=settings.accumulate,
        clip_grad=settings.clip_grad,
        precision=settings.precision if strategy.autocasts else "fp32",
        device=device,
    )
    ours: list[Hook] = [
        StepHook(),
        *guards(settings),
        LogHook(settings, sampler.epoch(1)),
        DataWaitHook(settings, dataset, sampler.epoch(settings.steps)),
        *writers(settings),
        ProgressHook(settings.steps),
        CheckpointHook(settings, named, strategy, about),
    ]
    restore = None if start_from is None else restorer(start_from, named, device)
    runner = QuietRunner(
        restore=restore,
        model=wrapped,
        work_dir=str(work_dir),
        train_dataloader=build_loader(dataset, sampler, collate, settings, device),
        train_cfg={
            "type": StepLoop,
            "max_iters": settings.steps,
            "accumulate": settings.accumulate,
            "start": sampler.start,
        },
        optim_wrapper=wrapper,
        param_scheduler=[ClosedFormLR(wrapper, settings)],
        default_hooks=REPLACED,
        custom_hooks=[*ours, *hooks],
        randomness={"seed": (settings.seed + rank) % 2**32},
        log_level="ERROR",
        default_scope=None,
        # mmengine keeps one logger and one message hub a name for the life of the process
        experiment_name=f"laavit-{uuid.uuid4().hex}",
    )
    try:
        with told_out_of_memory(runner, settings), kept_alike(model, strategy, dataset):
            runner.train()
    finally:
        runner.call_hook("close")
        for kind in (MMLogger, MessageHub, Visualizer):
            kind._instance_dict.pop(runner.experiment_name, None)
