"""How a run is trained: every number of Table A1, and what the machine needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from laavit.registry import SETTINGS, UserError, nearest

SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("fp32", "bf16")
PACKINGS = ("none", "pack")
FORMATS = ("consolidated", "sharded")
KERNELS = ("none", "liger")
REACTIONS = ("warn", "stop")


class TrainingStopped(UserError):
    """Training cannot go on (loss not finite, disk full, ...): one sentence that says where, why and what to do.

    It is a ``UserError`` so that every tool turns it into one line and exit code 2; the last checkpoint is intact.
    """


def best_rule(text: str) -> tuple[str, str]:
    """``'ntp:min'`` -> the figure's name, and 'min' or 'max'.

    Raises:
        UserError: it is no such text.
    """
    name, _, which = text.rpartition(":")
    if not name or which not in ("min", "max"):
        raise UserError(f"train.keep_best: got '{text}'; allowed: FIGURE:min or FIGURE:max, for example 'ntp:min'")
    return name, which


@SETTINGS.register_module(name="train")
@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run; the defaults are the paper's (Table A1).

    Args:
        steps: optimizer steps of the whole run.
        batch_size: samples (with ``grouped``: groups) of one optimizer step, over all micro-batches and processes
            together; not read where ``tokens`` is given.
        tokens: about the most tokens of one optimizer step, over all micro-batches and processes together, in place of
            a number of samples; each micro-batch gets its even share, a sample more or less. 0: ``batch_size`` counts.
        bucketing: steps whose samples are sorted by length and then cut into steps of like lengths, and these into
            micro-batches of like lengths (1: into these alone); 0 sorts nothing.
        accumulate: micro-batches of one step. However a step is split over micro-batches and processes, each of its
            losses is a mean over all of its tokens or samples.
        grouped: put all samples of one group into one batch, for example all questions about one image; the data set
            must have an attribute ``groups``, one hashable key a sample.
        shared_prefix: read what the samples of a micro-batch begin with alike (system prompt and image, where
            questions are about the same one) once, with the same gradient (dropout aside, which draws other numbers);
            ``grouped`` brings such samples together.
        packing: 'pack' has the decoder read the samples of a micro-batch as one row without padding, with the same
            losses and gradient (dropout aside); 'none' side by side, padded to the longest.
        lr: peak learning rate of AdamW.
        betas: AdamW's decay rates of the first and second moment.
        weight_decay: AdamW's decoupled decay of matrices; vectors (norms, biases) are never decayed.
        warmup_ratio: share of ``steps`` with a linearly growing learning rate, rounded up.
        schedule: what the learning rate does after the warm-up: 'linear' or 'cosine' to 0 at ``steps``, or 'constant'.
        clip_grad: largest norm of the whole gradient, 0 for no clipping.
        precision: 'fp32', or 'bf16' (autocast; the weights and AdamW's state stay float32).
        kernels: 'liger' puts Liger's fused kernels (arXiv 2410.10989) in place of transformers' norms, MLPs and rotary
            embeddings and of the loss; it has to be installed, and needs a GPU. 'none' is PyTorch alone.
        compile: compile each block of the decoder (``torch.compile``); its attention function stays as it is.
        loss_rows: answer tokens whose logits are in memory at once; the others' are worked out when it is their turn,
            and again in the backward pass. 0: all.
        gradient_checkpointing: recompute activations in the backward pass (non-re-entrant), trading time for memory.
        find_unused_parameters: with several processes, allow trainable parameters that a step does not use.
        workers: processes that load data beside the training process; a sample must be a pure function of its index.
        prefetch: batches that each worker keeps ready.
        cache_vision: MiB of main memory for what a frozen vision tower makes of images, each of which then passes it
            once as long as there is room (the images used longest ago go first); 0 keeps none. Qwen-VL's families.
        checkpoint_every: steps between checkpoints; the last step always leaves one. 0: only the last.
        checkpoint_format: 'consolidated' (a Hugging Face folder and the optimizer's state, written by one process), or
            'sharded' (every process writes its share of what is trained; the last step leaves a consolidated one).
        checkpoint_async: copy the state to the CPU's memory between steps and write it in the background.
        keep_last: how many of the newest checkpoints stay on disk, 0 for all.
        keep_best: a logged figure, and which way is better, as 'ntp:min' or 'probe/in_box:max': the checkpoint with the
            best one stays too, under the name ``checkpoints/best``; None keeps none.
        disk_retry_s: seconds for which a checkpoint that cannot be written (disk full, read-only) is tried again, while
            training waits, before the run stops.
        log_every: steps between lines of ``log.jsonl``; the first and the last step are always logged.
        threads: ``torch.set_num_threads``; None leaves the process as it is.
        seed: of the order of the data and of every random number drawn while training.
        tensorboard: write the logged figures for TensorBoard too, under ``tensorboard/``.
        wandb: write them to this project of Weights & Biases too (WANDB_MODE=offline keeps them here); None: nowhere.
        skip_nonfinite: how many steps of the run may be skipped, and kept under ``bad_batches/``, because loss or
            gradient is not finite; the next one stops the run. 0: the first does.
        on_divergence: what happens when a loss stays far above its running median: 'warn' or 'stop'.
        stall_minutes: without a micro-batch, after which the run ends and leaves every process's stacks under
            ``stalled/``; 0: never.
        probe_every: steps between looks at samples that are not trained on (figures ``probe/...``); the last step is
            one. 0: never. The result does not depend on it.
        probe_samples: how many of them.
        probe_annotations: the recipe's data with another file are the samples that are looked at.
        probe_split: the recipe's data with another split are (both together are allowed).
        probe_traces: a trace store of these samples, for the targets that need one; without, these are left out.
        device: 'auto' (a GPU where there is one), 'cpu', 'cuda' or 'cuda:1'.
    """

    steps: int = 1000
    batch_size: int = 16
    tokens: int = 0
    bucketing: int = 0
    accumulate: int = 1
    grouped: bool = False
    shared_prefix: bool = False
    packing: Literal["none", "pack"] = "none"
    lr: float = 5e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip_grad: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    kernels: Literal["none", "liger"] = "none"
    compile: bool = False
    loss_rows: int = 0
    gradient_checkpointing: bool = False
    find_unused_parameters: bool = False
    workers: int = 0
    prefetch: int = 2
    cache_vision: int = 0
    checkpoint_every: int = 100
    checkpoint_format: Literal["consolidated", "sharded"] = "consolidated"
    checkpoint_async: bool = False
    keep_last: int = 2
    keep_best: str | None = None
    disk_retry_s: float = 60.0
    log_every: int = 10
    threads: int | None = None
    seed: int = 0
    tensorboard: bool = True
    wandb: str | None = None
    skip_nonfinite: int = 0
    on_divergence: Literal["warn", "stop"] = "warn"
    stall_minutes: float = 30.0
    probe_every: int = 0
    probe_samples: int = 64
    probe_annotations: str | None = None
    probe_split: str | None = None
    probe_traces: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        at_least = {"steps": 1, "batch_size": 1, "accumulate": 1, "log_every": 1, "workers": 0, "checkpoint_every": 0}
        at_least |= {"tokens": 0, "bucketing": 0}
        at_least |= {"keep_last": 0, "seed": 0, "prefetch": 1, "cache_vision": 0, "loss_rows": 0}
        at_least |= {"skip_nonfinite": 0, "probe_every": 0, "probe_samples": 1}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"train.{name}: got {getattr(self, name)}; allowed: {least} or more")
        if self.seed >= 2**32:
            raise UserError(f"train.seed: got {self.seed}; allowed: 0 to {2**32 - 1}")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"train.threads: got {self.threads}; allowed: 1 or more, or None")
        for name in ("lr", "weight_decay", "clip_grad", "disk_retry_s", "stall_minutes"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"train.{name}: got {value}; allowed: a finite number of 0 or more")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"train.warmup_ratio: got {self.warmup_ratio}; allowed: 0 to 1")
        if self.keep_best is not None:
            best_rule(self.keep_best)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"train.betas: got {self.betas}; allowed: two numbers from 0 to below 1")
        if self.kernels == "liger" and self.loss_rows:
            raise UserError("train.loss_rows: Liger's fused loss keeps no logits anyway; set train.loss_rows=0")
        choices = {"schedule": SCHEDULES, "precision": PRECISIONS, "packing": PACKINGS, "on_divergence": REACTIONS}
        choices |= {"checkpoint_format": FORMATS, "kernels": KERNELS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"train.{name}: got {getattr(self, name)!r}; {nearest(getattr(self, name), allowed)}")

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up: ``ceil(warmup_ratio * steps)``, as Hugging Face's trainer counts them."""
        return math.ceil(self.warmup_ratio * self.steps)

    def logs(self, done: int) -> bool:
        """Whether a line is logged when ``done`` steps are."""
        return done in (1, self.steps) or done % self.log_every == 0 or self.probes(done)

    def probes(self, done: int) -> bool:
        """Whether the held-out samples are looked at when ``done`` steps are."""
        return self.probe_every > 0 and (done == self.steps or done % self.probe_every == 0)

    def as_dict(self) -> dict[str, object]:
        """Plain data, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "betas": list(self.betas)}
