"""The contract of a target: what it needs, what it prepares for a sample, and the scalar it gives for a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laavit.registry import UserError
from laavit.structures import Encoded, StudentOutput, Trace


class Target(nn.Module):
    """One alignment target; ``L = L_ntp + sum(weight * target)`` (Eq. 9).

    A constructor takes a recipe's arguments only; sizes come later, in ``setup``. Subclasses name what they need:

    Args:
        weight: its share in the total loss (lambda; paper: 0.3).
    """

    #: kinds of attention rows the student must record for it (``laavit.backbones.rows.ROW_KINDS``)
    rows: tuple[str, ...] = ()
    #: decoder layers of those rows, negative ones from the end; None is all
    layers: tuple[int, ...] | None = None
    #: whether it reads the decoder's input embeddings (``StudentOutput.embeddings``)
    needs_embeddings: bool = False
    #: whether it reads the logits at the answers' tokens (``StudentOutput.logits``)
    needs_logits: bool = False
    #: whether it reads the latents (their states, or their rows and their separator's)
    needs_latents: bool = False
    #: samples that a micro-batch must hold
    min_batch: int = 1
    #: whether a sample needs a trace
    needs_trace: bool = True
    #: whether a sample needs boxes
    needs_boxes: bool = False
    #: whether these must say in which order they are looked at (``laavit.targets.steps.hop_boxes``)
    needs_hops: bool = False
    #: a trace store of its own, where its traces are not the run's (traces.path)
    store: str | None = None
    #: a negative control (``laavit.targets.controls``), and what fixes its choices
    control: str = "none"
    seed: int = 0

    def __init__(self, weight: float = 0.3) -> None:
        super().__init__()
        if not weight >= 0:
            raise UserError(f"a target's weight is not negative, got {weight}")
        self.weight = weight

    def setup(self, width: int, depth: int, latents: int, header: Mapping[str, Any]) -> None:
        """Build what depends on sizes.

        Args:
            width: D of the student. depth: its number of layers L. latents: K. header: the trace store's header.
        """

    def prepare(self, encoded: Encoded, trace: Trace | None) -> dict[str, Tensor]:
        """What this sample is compared with, worked out once, in a data worker: tensors whose sizes may vary.

        Under a control with partners ``trace`` and ``encoded.sample.boxes`` are another sample's.
        """
        raise TypeError(f"{type(self).__name__} must define prepare(encoded, trace)")

    def forward(self, output: StudentOutput, roles: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch: a scalar.

        Args:
            output: the student's. roles: [B, S]. prepared: what ``prepare`` gave, stacked and zero-padded.
        """
        raise TypeError(f"{type(self).__name__} must define forward(output, roles, prepared)")

    def count(self, roles: Tensor, prepared: Mapping[str, Tensor]) -> int | Tensor:
        """Over how many things ``forward`` takes its mean: what a micro-batch weighs among those of its step.

        Here the batch's samples, B. A target that is a mean over something else (its tokens, say) counts that, so that
        the loss of a step does not depend on how its samples were split.
        """
        return len(roles)

    def own_layers(self, depth: int) -> list[int]:
        """The layers of its rows, counted from 0, as named (all where none is)."""
        return list(range(depth)) if self.layers is None else [layer % depth for layer in self.layers]

    def own_rows(self, output: StudentOutput, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """This target's rows averaged over layers, [B, R, S], and which of them are no padding, bool [B, R]."""
        rows = torch.stack([output.rows[layer] for layer in layers]).mean(0)
        parts, valid, offset = [], [], 0
        for kind, index in output.row_positions.items():
            if kind in self.rows:
                parts.append(rows[:, offset : offset + index.shape[1]])
                valid.append(index >= 0)
            offset += index.shape[1]
        return torch.cat(parts, 1), torch.cat(valid, 1)


def stack(prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What a target prepared for several samples as one batch, every axis zero-padded: {name: [B, ...]}."""
    return {key: _padded([item[key] for item in prepared]) for key in prepared[0]}


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    out = tensors[0].new_zeros(len(tensors), *map(max, zip(*(tensor.shape for tensor in tensors), strict=True)))
    for place, tensor in enumerate(tensors):
        out[place][tuple(slice(size) for size in tensor.shape)] = tensor
    return out
