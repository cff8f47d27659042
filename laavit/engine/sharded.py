"""Tensors of all processes in one folder, each writing its share: PyTorch's distributed checkpoints as safetensors.

The folder holds ``shard-<process>-model-<n>-of-<N>.safetensors`` only; which part of a tensor a file has stands in its
header, so any number of processes can read what any other number wrote. Nothing is pickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from laavit.registry import UserError

SHARDS = "shards"
#: what the names of a checkpoint's tensors begin with
MODEL, OPTIMIZER = "model.", "optimizer."
#: a file takes tensors up to this size together: one is put together in memory before it is written
FILE_BYTES = 64 << 20

warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")  # one process is no mistake


def files_of(tensors: Mapping[str, Tensor], limit: int = FILE_BYTES) -> dict[str, int]:
    """The number of the file, from 1, that each tensor goes into: in order, a new one whenever ``limit`` is passed."""
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        bytes_here = tensor.numel() * tensor.element_size()
        if size and size + bytes_here > limit:
            number, size = number + 1, 0
        numbers[name], size = number, size + bytes_here
    return numbers


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Write tensors; all processes of ``group`` together, with the same names.

    A sharded tensor's parts are written by who has them, any other tensor by one of the processes.

    Raises:
        OSError, SafetensorError: in every process, when one of them could not write.
    """
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files_of(tensors), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        _raise_cause(error)


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """Names and whole shapes of what a folder holds.

    Raises:
        UserError: it cannot be read.
    """
    return {name: entry.size for name, entry in _metadata(folder).items()}


def read_shards(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors, each process its own share of sharded ones; names that are not asked for are left unread.

    Raises:
        UserError: the folder cannot be read, or lacks a tensor.
    """
    try:
        # Nothing is said between processes: each reads the parts that it needs.
        dcp.load(dict(into), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        try:
            _raise_cause(error)
        except (OSError, SafetensorError, RuntimeError, ValueError, AssertionError) as cause:
            raise UserError(f"the checkpoint '{folder}' cannot be read: {cause}") from None


def dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The number formats of what a folder holds; errors as ``stored_shapes``."""
    return {name: entry.properties.dtype for name, entry in _metadata(folder).items()}


def _metadata(folder: Path) -> dict[str, TensorStorageMetadata]:
    try:
        found: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError) as error:
        raise UserError(f"the checkpoint '{folder}' cannot be read: {error}") from None
    return found


def _raise_cause(error: CheckpointException) -> None:
    """Raise what went wrong in the first process that failed; the exception around it is no ``Exception``."""
    raise next(iter(error.failures.values()))[0] from None
