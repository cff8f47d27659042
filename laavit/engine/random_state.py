"""The state of every random number generator as tensors, so that a checkpoint needs no pickle."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from laavit.engine.distributed import gather, rank_and_world


def capture(device: torch.device) -> dict[str, Tensor]:
    """States of Python's, NumPy's, torch's and the GPU's generators of all processes, each [W, n].

    Every process must call it; NumPy's and Python's Mersenne twisters are 624 words, their position and a spare normal.
    """
    version, words, spare = random.getstate()
    assert version == 3, "Python's random.getstate() has had version 3 since 2.6"
    twister = np.random.get_state(legacy=False)
    assert isinstance(twister, dict) and twister["bit_generator"] == "MT19937", "np.random's is a Mersenne twister"
    keys, position = twister["state"]["key"], twister["state"]["pos"]
    states = {
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.spare": torch.tensor([spare is not None, spare or 0.0], dtype=torch.float64),
        "numpy.words": torch.tensor(np.append(keys.astype(np.int64), position), dtype=torch.int64),
        "numpy.spare": torch.tensor([twister["has_gauss"], twister["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: gather(state, device) for name, state in states.items()}


def restore(states: dict[str, Tensor], device: torch.device) -> bool:
    """Put the states back. Returns whether this process's own states were there.

    They are not where the run had another number of processes; then the generators are left as they are.
    """
    rank, world = rank_and_world()
    if states["torch"].shape[0] != world:
        return False
    # Clones: torch.set_rng_state misreads (or crashes on) a tensor that does not begin its storage.
    own = {name: state[rank].clone() for name, state in states.items()}
    has_spare, spare = own["python.spare"].tolist()
    random.setstate((3, tuple(own["python.words"].tolist()), spare if has_spare else None))
    *keys, position = own["numpy.words"].tolist()
    has_spare, spare = own["numpy.spare"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, int(has_spare), spare))
    torch.set_rng_state(own["torch"])
    if device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], device)
    return True
