"""One query's attention row, read off a model while it runs: O(S) a layer, no S x S map, no forward rewritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from laavit.registry import UserError


class RowProbe(TorchFunctionMode):
    """Records the first query's row of chosen attention modules, for as long as the context is open.

    torch hands every call of ``scaled_dot_product_attention`` to an open function mode (``torch.overrides``), with the
    queries and keys as the model made them: normalised, rotated, registers included. Nothing of a model's own way to
    them is repeated here. ``nn.MultiheadAttention`` keeps its call inside one torch function, so its row's query and
    its keys are projected once more (a twelfth of a block's work).

    Args:
        modules: what to record, by a key of the caller's; the first query of each is read (the CLS token, or the one
            probe of an attention pool).

    Attributes:
        rows: the recorded rows by key, [B, H, S] each, every head's own softmax in float32 or better.

    Raises:
        UserError: on leaving, if a module ran no such call (attention written out in another way).
    """

    def __init__(self, modules: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.modules = dict(modules)
        self.rows: dict[int, Tensor] = {}
        self._inside: int | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> RowProbe:
        for key, module in self.modules.items():
            self._hooks.append(module.register_forward_pre_hook(lambda *_, key=key: setattr(self, "_inside", key)))
            self._hooks.append(module.register_forward_hook(lambda *_: setattr(self, "_inside", None)))
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        while self._hooks:
            self._hooks.pop().remove()
        self._inside = None
        silent = [key for key in self.modules if key not in self.rows]
        if kind is None and silent:
            name = type(self.modules[silent[0]]).__name__
            raise UserError(f"the attention of {name} (layer {silent[0]}) does not go through torch's own function")

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside is not None:
            if func is F.scaled_dot_product_attention:
                self.rows[self._inside] = first_row(args[0][..., :1, :], args[1], kwargs.get("scale"))
            elif func is F.multi_head_attention_forward:
                self.rows[self._inside] = _first_row_of_projections(*args[:7])
        return func(*args, **kwargs)


def first_row(query: Tensor, keys: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) of one query: [B, H, 1, D_h], [B, H, S, D_h] -> [B, H, S]; scale: D_h^-1/2 by default."""
    kind = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(kind) @ keys.to(kind).transpose(-2, -1)
    return (scores * (query.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1).squeeze(-2)


def _first_row_of_projections(
    query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The row inside ``F.multi_head_attention_forward`` of joint projections: query, key [S, B, D] -> [B, H, S]."""
    if weight is None:
        raise UserError("nn.MultiheadAttention with separate projections cannot be read")
    parts = (None, None) if bias is None else (bias[:width], bias[width : 2 * width])
    queries = F.linear(query[:1], weight[:width], parts[0])
    keys = F.linear(key, weight[width : 2 * width], parts[1])
    return first_row(_by_head(queries, heads), _by_head(keys, heads))


def _by_head(states: Tensor, heads: int) -> Tensor:
    """[S, B, D] -> [B, H, S, D_h]."""
    return states.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
