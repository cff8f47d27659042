"""Faster ways to compute the same step: compiled blocks, Liger's kernels, a loss without whole logits.

All of them change modules of the model in place and none of its names: parameters, checkpoints and exports stay as
they are. They come before a strategy spreads the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from laavit.cross_entropy import liger_loss, part_by_part
from laavit.registry import UserError, nearest

if TYPE_CHECKING:
    from laavit.engine.settings import TrainSettings

#: what compiles the blocks
BACKEND = "inductor"


def use_kernels(model: Any, settings: TrainSettings, device: torch.device) -> None:
    """Let a model compute as the settings ``kernels`` and ``loss_rows`` say; see whether it can be compiled.

    Blocks are compiled (``compile_blocks``) when it is known whether they are checkpointed.

    Args:
        model: a ``LaViT``; another one where none of the three is set.

    Raises:
        UserError: Liger is not installed, has no kernels for this family or no GPU, a target reads the logits, or
        there is no compiler.
    """
    if settings.kernels == "liger":
        use_liger(model, device)
    if settings.loss_rows or settings.kernels == "liger":
        reading = [name for name, target in model.named_targets.items() if target.needs_logits]
        if reading and settings.loss_rows:
            raise UserError(
                f"train.loss_rows: the target '{reading[0]}' reads all logits at once; set train.loss_rows=0"
            )
        if not reading:
            model.token_loss = partial(part_by_part, rows=settings.loss_rows) if settings.loss_rows else liger_loss
    if settings.compile and device.type == "cpu" and BACKEND == "inductor":
        check_compiler()


def decoder_blocks(model: Any) -> list[nn.Module]:
    """The layers of a student's text decoder."""
    backbone = model.student.backbone
    return list(backbone.family.decoder(backbone.model).layers)


def compile_blocks(model: Any, checkpointed: bool = False) -> None:
    """Compile each block of the decoder: all of them share one piece of code, whatever the depth.

    The whole model would be one graph for every depth, and broken where hooks record what enters the decoder. A block
    is cut at its attention function, which keeps books on the Python side (laavit/attention.py) and runs fused kernels.

    Args:
        checkpointed: transformers checkpoints the blocks' activations already. The compiler gives up a checkpoint with
            a cut inside, and says nothing: what the checkpoint runs, and runs again, is compiled in the block's place.
    """
    compiled = cache(partial(torch.compile, backend=BACKEND))
    for block in decoder_blocks(model):
        if checkpointed:
            checkpoint: Any = block._gradient_checkpointing_func
            block._gradient_checkpointing_func = partial(_compiled, compiled, checkpoint)  # type: ignore[assignment]
        else:
            block.compile(backend=BACKEND)


def _compiled(compiled: Callable[..., Any], checkpoint: Callable[..., Any], run: Any, *args: Any) -> Any:
    """``checkpoint(run, *args)`` with the function inside ``run``, a ``functools.partial``, compiled."""
    return checkpoint(partial(compiled(run.func), *run.args, **run.keywords), *args)


def check_compiler() -> None:
    """Raises: UserError: there is no C++ compiler, without which PyTorch compiles nothing for the CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # of seconds
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "train.compile: there is no C++ compiler, which compiling for the CPU needs: install g++, name one in the "
            "environment as CXX, or set train.compile=False"
        ) from None


def use_liger(model: Any, device: torch.device) -> None:
    """Put Liger's norms, MLPs and rotary embeddings in place of transformers'.

    Raises:
        UserError: it is not installed, has no kernels for this family, or there is no GPU.
    """
    if find_spec("liger_kernel") is None:
        raise UserError("train.kernels: 'liger' needs the package liger-kernel: pip install liger-kernel")
    if device.type != "cuda":
        raise UserError(f"train.kernels: 'liger' needs a GPU, and this run is on {device}; set train.kernels='none'")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    inner = model.student.backbone.model
    kind = inner.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = nearest(kind, MODEL_TYPE_TO_APPLY_LIGER_FN)
        raise UserError(f"train.kernels: Liger has no kernels for '{kind}'; {known}")
    # The loss stays ours: it reads labelled positions alone.
    _apply_liger_kernel_to_instance(model=inner, cross_entropy=False, fused_linear_cross_entropy=False)
