"""Negative controls: a target of the same shape, and of the same entropy or norm, that says nothing about its sample.

Random attention targets can help as much as true ones (arXiv 2004.05704), so a gain counts against these:

=============  ==========================================================================================
none           the sample's own
shuffled       another sample's (possibly of the same image, with another question)
wrong_image    another sample's, of another image
random         the sample's own with its cells (of a map) or components (of a state) in an order drawn once
uniform        the same share everywhere (maps alone)
=============  ==========================================================================================

Every choice is fixed by the target's ``seed``, whatever the seed of the run. ``shuffled`` and ``wrong_image`` are
permutations of the data set, so that the set of targets stays what it was; partners have as many images as the sample.
The other sample's map is carried to this sample's tiles, as the teacher's always is.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from laavit.registry import UserError, nearest

#: controls whose trace and boxes are another sample's; the data set hands them over
PAIRED = ("shuffled", "wrong_image")
STATE_CONTROLS = ("none", *PAIRED, "random")
MAP_CONTROLS = (*STATE_CONTROLS, "uniform")


def check_control(control: str, allowed: Sequence[str] = MAP_CONTROLS) -> str:
    """The control as given.

    Raises:
        UserError: there is none of this name, or it does not apply to this kind of target.
    """
    if control not in allowed:
        reason = "; only a map can be uniform" if control == "uniform" else ""
        raise UserError(f"control: got '{control}'{reason}; {nearest(control, allowed)}")
    return control


def derangement(keys: Sequence[Hashable], groups: Sequence[Hashable], seed: int) -> np.ndarray:
    """A permutation without a fixed point: ``partner[i]`` is of another key and of the same group as ``i``.

    Within a group, in an order drawn by the seed, equal keys stand together and everyone takes the place that lies as
    far ahead as the largest block is long.

    Args:
        keys: what must differ (a sample's own place, or its images). groups: what must agree (its number of images).

    Raises:
        UserError: there is none, since more than half of a group has one key.
    """
    partner = np.arange(len(keys))
    members: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    for number, places in enumerate(members.values()):
        order = np.random.default_rng([seed, number]).permutation(places)
        codes: dict[Hashable, int] = {}
        blocks = np.array([codes.setdefault(keys[place], len(codes)) for place in order.tolist()])
        largest = max(Counter(blocks.tolist()).values())
        if 2 * largest > len(order):
            raise UserError(
                f"this control gives each sample another one's target, but of {len(order)} samples with one number "
                f"of images {largest} stand for the same"
            )
        order = order[np.argsort(blocks, kind="stable")]
        partner[order] = np.roll(order, -largest)
    return partner


def partners(control: str, image_keys: Sequence[Hashable], seed: int) -> np.ndarray:
    """Whose trace and boxes each sample gets: its own place in the data set, or another's (``PAIRED``).

    Args:
        image_keys: what names the images of every sample; a tuple has an entry for each image.

    Raises:
        UserError: the data set does not allow it.
    """
    if control not in PAIRED:
        return np.arange(len(image_keys))
    keys = image_keys if control == "wrong_image" else range(len(image_keys))
    try:
        return derangement(keys, [len(key) if isinstance(key, tuple) else 1 for key in image_keys], seed)
    except UserError as error:
        raise UserError(f"control: '{control}': {error}") from None


def shuffled_cells(values: Tensor, seed: int, sample_id: str) -> Tensor:
    """[..., N] with its last axis in an order fixed by seed and sample: the same values, entropy and norm."""
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return values[..., torch.randperm(values.shape[-1], generator=generator)]
