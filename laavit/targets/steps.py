"""Steps of looking, a teacher's or the hops of boxes, and who follows which: latents, or layers, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from laavit.registry import UserError
from laavit.structures import Box, Sample

#: the key of a sample's ``meta`` that says which of its boxes belong to which hop
HOPS = "hops"
#: the order in which steps are followed
ORDERS = ("given", "reversed", "shuffled")

T = TypeVar("T")


def step_of_latent(steps: int, latents: int) -> Tensor:
    """Which step of a trajectory each latent (or layer, or token) follows: long [K], floor(j * T / K).

    One to one where T = K. With fewer steps than latents each is followed by a run of neighbouring latents; with more,
    the latents follow the first of each of K runs of steps. The order of the steps is kept in any case.
    """
    return torch.arange(latents) * steps // latents


def hop_boxes(sample: Sample) -> list[tuple[Box, ...]]:
    """A sample's boxes in the order in which they are looked at, by ``meta['hops']``: lists of places in ``boxes``.

    A single box needs no such key: it is one hop.

    Raises:
        UserError: there is no box, no order, or one that does not fit the boxes.
    """
    boxes, given = sample.boxes, sample.meta.get(HOPS)
    if not boxes:
        raise UserError(f"sample '{sample.id}' has no box, and hops are made of boxes")
    if given is None:
        if len(boxes) == 1:
            return [boxes]
        raise UserError(
            f"sample '{sample.id}' has {len(boxes)} boxes and does not say in which order they are looked at: its "
            f"record lacks '{HOPS}', for example [[0], [1, 2]], the places of its boxes hop by hop"
        )
    right = isinstance(given, list) and given and all(isinstance(hop, list) and hop for hop in given)
    if not right or any(type(place) is not int or not 0 <= place < len(boxes) for hop in given for place in hop):
        raise UserError(
            f"sample '{sample.id}': '{HOPS}' is {given!r}; allowed: lists of places in its {len(boxes)} boxes, from 0"
        )
    return [tuple(boxes[place] for place in hop) for hop in given]


def ordered(steps: Sequence[T], order: str, seed: int, sample_id: str) -> list[T]:
    """The steps as ``order`` says; 'shuffled' is never the given order where there are two or more.

    Args:
        seed, sample_id: fix the shuffled order.
    """
    if order == "reversed":
        return list(steps[::-1])
    if order != "shuffled" or len(steps) < 2:
        return list(steps)
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    while (places := generator.permutation(len(steps))).tolist() == list(range(len(steps))):
        pass
    return [steps[place] for place in places]
