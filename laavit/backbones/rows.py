"""Kinds of positions by name: whose attention rows are recorded, and who is gated. No loop over tokens or samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from laavit.registry import UserError, nearest
from laavit.structures import Batch, Role


def _header(batch: Batch) -> Tensor:
    start, stop = torch.tensor(batch.headers, device=batch.roles.device).unbind(1)
    index = torch.arange(batch.roles.shape[1], device=batch.roles.device)
    return (index >= start[:, None]) & (index < stop[:, None])


def _separator(batch: Batch) -> Tensor:
    answer = batch.roles == Role.ANSWER
    return answer & (answer.cumsum(1) == 1) & (batch.roles == Role.LATENT).any(1, keepdim=True)


def emits(roles: Tensor) -> Tensor:
    """Where a latent or the separator comes next: bool [..., S] of roles [..., S], which begin with something else."""
    return (roles == Role.LATENT) | (roles.roll(-1, -1) == Role.LATENT)


#: A kind of row -> mask [B, S] of the positions it stands for.
ROW_KINDS: dict[str, Callable[[Batch], Tensor]] = {
    "question": lambda batch: batch.roles == Role.QUESTION,
    "header": _header,  # the assistant's header, whose last token predicts what follows
    "latents": lambda batch: batch.roles == Role.LATENT,
    "separator": _separator,
    "answer": lambda batch: batch.roles == Role.ANSWER,  # the separator (with latents) and the answer's tokens
    # the positions whose logits choose the answer's tokens; latents that a student writes itself are none of these
    "predicting": lambda batch: (batch.labels >= 0) & ~emits(batch.roles),
}


def check_kinds(key: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds as given.

    Raises:
        UserError: none is named, or one does not exist.
    """
    if not kinds:
        raise UserError(f"{key}: names no kind of row; {nearest('', ROW_KINDS)}")
    for kind in kinds:
        if kind not in ROW_KINDS:
            raise UserError(f"{key}: no kind of row is called '{kind}'; {nearest(kind, ROW_KINDS)}")
    return tuple(kinds)


def positions(mask: Tensor) -> Tensor:
    """Positions of a mask's true entries in order, long [B, R], padded with -1 (R: the largest count of the batch)."""
    counts = mask.sum(1)
    width = int(counts.max()) if mask.numel() else 0
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    return order.masked_fill(torch.arange(width, device=mask.device) >= counts[:, None], -1)


def row_positions(batch: Batch, kind: str) -> Tensor:
    """Positions of one kind of row: long [B, R], -1 pads."""
    return positions(ROW_KINDS[kind](batch))


def image_rows(rows: Tensor, roles: Tensor) -> tuple[Tensor, Tensor]:
    """The image columns of recorded rows.

    Args:
        rows: [B, R, S]. roles: [B, S].

    Returns: the columns [B, R, N], zero where padded, and their mask bool [B, N].
    """
    index = positions(roles == Role.IMAGE)
    valid = index >= 0
    picked = rows.gather(2, index.clamp(min=0)[:, None].expand(-1, rows.shape[1], -1))
    return picked * valid[:, None], valid
