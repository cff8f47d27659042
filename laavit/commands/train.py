"""``tools/train.py cfg.py``: train a recipe."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from laavit.commands.common import data_card, parse_recipe, recipe_parser
from laavit.commands.held_out import held_out, probe_of
from laavit.data.aligned import AlignedDataset, Collate, TraceSettings, encodings, ids_of, select
from laavit.recipe import Recipe
from laavit.registry import UserError
from laavit.structures import Sample
from laavit.traces.hub import local_store
from laavit.traces.shards import read_header
from laavit.traces.store import TraceStore

logger = logging.getLogger(__name__)


def check_data(store: TraceStore, recipe: Recipe) -> None:
    """Refuse traces of other annotations than the recipe's."""
    card = data_card(recipe)
    if "annotations_sha256" in card:
        store.check({"data": {"annotations_sha256": card["annotations_sha256"]}})


def open_store(settings: TraceSettings, recipe: Recipe) -> TraceStore | None:
    """The recipe's trace store, checked against the recipe; None where none is named."""
    if settings.path is None:
        return None
    store = TraceStore(local_store(settings.path))
    check_data(store, recipe)
    if recipe.has("teacher"):
        store.check({"teacher": recipe.arguments("teacher").get("path")})
    return store


def samples_key(samples: Sequence[Sample], recipe: Recipe) -> Hashable:
    """What says which samples a run trains on, in which order."""
    chosen = hashlib.sha256("\n".join(ids_of(samples)).encode()).hexdigest()
    return json.dumps(data_card(recipe), sort_keys=True, default=str), chosen


def store_of(recipe: Recipe) -> TraceStore | None:
    """The trace store that a recipe's filters and targets need; None where they need none.

    Raises:
        UserError: it, or a target's own, is not there or does not fit.
    """
    traces: TraceSettings = recipe.build("traces")
    parts = {name: recipe.build(f"targets.{name}") for name in recipe.config["targets"]}
    for name, part in parts.items():
        if part.needs_trace and part.store is not None and read_header(local_store(part.store)) is None:
            raise UserError(f"targets.{name}: there is no trace store at '{part.store}'")
    needed = bool(traces.select) or any(part.needs_trace and part.store is None for part in parts.values())
    return open_store(traces, recipe) if needed else None


def replay_recipe(recipe: Recipe, folder: Path) -> None:
    """Run a batch that a run has kept (``RUN/bad_batches/step_...``) once more, and tell what is not finite."""
    from laavit.engine.distributed import pick_device
    from laavit.engine.replay import replay
    from laavit.model import build_model

    settings = recipe.build("train")
    device = pick_device(settings.device)
    store = store_of(recipe)
    replay(build_model(recipe, store.header if store is not None else {}), folder, settings, device)


def train_recipe(recipe: Recipe, work_dir: Path, resume: bool = False) -> Path:
    """Train; returns the last checkpoint's folder."""
    from transformers.utils.logging import disable_progress_bar

    from laavit.backbones.loading import shapes_alone
    from laavit.backbones.vision_cache import VisionCache, keep_features
    from laavit.data.cached_features import fill
    from laavit.engine import train
    from laavit.engine.checkpoint import former_run
    from laavit.engine.distributed import pick_device
    from laavit.engine.hooks.probe import ProbeHook
    from laavit.engine.hooks.wandb import check_wandb
    from laavit.model import build_model

    settings = replace(recipe.build("train"), seed=recipe.config["seed"])
    check_wandb(settings.wandb)
    former_run(work_dir, resume)  # said before data and weights are read
    strategy = recipe.build("strategy") if recipe.has("strategy") else None
    traces: TraceSettings = recipe.build("traces")
    store = store_of(recipe)
    samples = select(recipe.build("data"), store, traces.select)
    if hasattr(samples, "check"):  # every image file is looked at, so that hours of work do not end at a missing one
        samples.check()
    looked_at = held_out(recipe, settings, samples) if settings.probe_every else []
    # A cache of image features runs the tower where data is loaded: then every process has its weights.
    waits = strategy is not None and strategy.hands_out and int(os.environ.get("RANK", 0)) > 0
    with shapes_alone() if waits and traces.vision_cache is None else nullcontext():
        model = build_model(recipe, store.header if store is not None else {})
    student = model.student
    cache = None
    if traces.vision_cache is not None:
        learning = [part for part in ("vision", "projector") if student.learns(part)]
        if learning:
            raise UserError(
                "traces.vision_cache keeps what the projector makes of an image for the whole run, and this recipe "
                f"trains {' and '.join(learning)}: name both in student.freeze, and neither in student.lora.targets"
            )
        cache = VisionCache(Path(traces.vision_cache), student.backbone, precision=settings.precision)
    if settings.cache_vision:
        keep_features(student.backbone, settings.cache_vision * 2**20)
    builder = student.builder(recipe.build("prompt"))
    if cache is not None and (settings.workers or (strategy is not None and strategy.shares_weights)):
        rank, world = (int(os.environ.get(name, least)) for name, least in (("RANK", 0), ("WORLD_SIZE", 1)))
        sets = [samples, looked_at]
        fill(cache, sets, builder, pick_device(settings.device), settings.workers, rank / world)
    shared = encodings((samples_key(samples, recipe), builder.key, cache and cache.namespace)) if traces.keep else None
    dataset = AlignedDataset(samples, builder, model.named_targets, store, cache, traces.keep, shared)
    for own in {id(each): each for each in dataset.stores.values() if each is not store}.values():
        check_data(own, recipe)
    card = {
        "data": data_card(recipe),
        "samples": len(samples),
        "student_weights_sha256": student.backbone.weights_digest(),
        "trace_store_sha256": store.digest(traces.select) if store is not None else None,
        "target_stores_sha256": {n: s.digest() for n, s in dataset.stores.items() if s is not store},
        "recipe_sha256": recipe.digest(),
        "trainable_parameters": sum(p.numel() for _, p in model.trainable_parameters()),
    }
    trainable = f"{card['trainable_parameters']:,}"
    logger.info("%d samples, %s trainable parameters -> %s", len(samples), trainable, work_dir)
    backbone, packed = student.backbone, settings.packing == "pack"
    collate = Collate(backbone.family, backbone.tokenizer.pad_token_id, settings.shared_prefix, packed)
    hooks = []
    if looked_at:
        hooks = [ProbeHook(settings, probe_of(settings, looked_at, model, dataset, store, collate))]
    disable_progress_bar()  # transformers' own: one for each checkpoint, through ours
    return train(model, dataset, collate, settings, work_dir, recipe.config, card, resume, hooks, strategy)


@contextmanager
def told_once() -> Iterator[None]:
    """Of the processes of a run the first tells what all know; of its own samples and errors, each one."""
    whole, own = logging.getLogger("laavit"), logging.getLogger("laavit.engine.own")
    levels = whole.level, own.level
    if int(os.environ.get("RANK", 0)) and "LAAVIT_LOG" not in os.environ:
        whole.setLevel(logging.ERROR)
        own.setLevel(logging.WARNING)
    try:
        yield
    finally:
        whole.setLevel(levels[0])
        own.setLevel(levels[1])


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """What a scheduler sends ends a run as Ctrl-C does: what is being written is finished, and a line tells it.

    With several processes it is torchrun that is told; one of them that waits for another could not listen.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = recipe_parser("train", "Train a recipe.")
    parser.add_argument("--work-dir", type=Path, help="run folder; default runs/<recipe's name>")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run folder")
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="RUN/bad_batches/STEP",
        help="train nothing: run a batch that was kept because its loss or gradient was not finite once more",
    )
    with told_once(), stopped_by_sigterm():
        options, recipe = parse_recipe(parser, argv)
        if recipe is not None and options.replay is not None:
            replay_recipe(recipe, options.replay)
        elif recipe is not None:
            checkpoint = train_recipe(recipe, options.work_dir or Path("runs") / recipe.config["title"], options.resume)
            logger.info("last checkpoint: %s", checkpoint)
    return 0
