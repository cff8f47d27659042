"""The optimizer's state by parameter name, whole or as every process's share of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from laavit.engine.optim import NamedParameters
from laavit.registry import UserError


def optimizer_state(optimizer: torch.optim.Optimizer, named: NamedParameters) -> dict[str, Tensor]:
    """AdamW's own tensors as ``{parameter name}/{exp_avg, exp_avg_sq, step}``; a sharded parameter's are sharded."""
    return {
        f"{name}/{key}": value.detach()
        for name, parameter in named
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Contiguous tensors with all that other processes hold of them; called by all processes together.

    Args:
        keep: whether this process wants them; otherwise it only gives its share, and gets nothing.
    """
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            gathered = tensor.full_tensor()
            tensor = gathered.cpu() if keep else gathered  # one at a time on the device: together they may not fit
        if keep:
            found[name] = tensor.contiguous()
    return found


def check_fits(stored: Mapping[str, torch.Size], named: NamedParameters) -> None:
    """Compare a checkpoint's optimizer state with the model's trainable parameters.

    Args:
        stored: shapes of the checkpoint's tensors, by names as ``optimizer_state`` makes them.

    Raises:
        UserError: the checkpoint belongs to a model with other trainable parameters.
    """
    names = dict(named)
    shapes = {path.rpartition("/")[0]: shape for path, shape in stored.items() if path.endswith("/exp_avg")}
    unknown = sorted(set(shapes) - set(names)) or sorted(set(names) - set(shapes))
    if shapes and unknown:
        where = "the checkpoint" if unknown[0] in shapes else "the model"
        raise UserError(
            f"the checkpoint's optimizer state does not fit: the parameter '{unknown[0]}' is only in {where}; "
            "resume with the recipe that the run was started with"
        )
    for name, shape in shapes.items():
        if shape != names[name].shape:
            raise UserError(
                f"the checkpoint's optimizer state does not fit: '{name}' is {tuple(shape)} there and "
                f"{tuple(names[name].shape)} in the model; resume with the recipe that the run was started with"
            )


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, named: NamedParameters, tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of ``optimizer_state``; whole tensors are shared out as their parameters are.

    Raises:
        UserError: as ``check_fits``.
    """
    check_fits({path: tensor.shape for path, tensor in tensors.items()}, named)
    names = dict(named)
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        parameter = names[name]
        data = parameter.data
        if isinstance(data, DTensor) and not isinstance(tensor, DTensor) and tensor.shape == parameter.shape:
            # Every process has read the whole: nothing need be sent.
            tensor = distribute_tensor(tensor, data.device_mesh, data.placements, src_data_rank=None)
        # Fused AdamW keeps even its step counter beside the parameter.
        optimizer.state[parameter][key] = tensor.to(parameter.device)
