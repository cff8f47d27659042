"""What of a student learns: parts by name, found through its family, or parameters by regular expression."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from laavit.backbones.base import Backbone
from laavit.registry import UserError, nearest

#: a part's name -> what it is
PARTS = {
    "vision": "the vision tower, with the projector where the tower holds it (Qwen-VL's mergers)",
    "tower": "the vision tower without its projector",
    "projector": "what stands between tower and decoder",
    "embeddings": "the table of input embeddings; the rows of latents and separator still learn",
    "head": "an untied output head; the rows of latents and separator still learn",
    "decoder": "the text decoder: its layers and its final norm",
}

Owner = nn.Module | nn.Parameter


def owners(part: str, backbone: Backbone) -> tuple[list[Owner], list[Owner]]:
    """The modules (or single parameters) that make up a part, and those within them that belong to another part."""
    model, family = backbone.model, backbone.family
    table: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    if part == "vision":
        return [family.vision_tower(model)], []
    if part == "tower":
        return [family.vision_tower(model)], family.projector(model)
    if part == "projector":
        return family.projector(model), []
    if part == "decoder":
        return [family.decoder(model)], [table]
    if part == "embeddings":
        return [table], []
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    return ([head] if head is not None else []), [table]


def parameters_of(part: str, backbone: Backbone) -> list[nn.Parameter]:
    """A part's parameters; of a head that shares its weights with the embeddings, none."""
    own, others = ({id(p): p for p in _parameters(found)} for found in owners(part, backbone))
    return [p for key, p in own.items() if key not in others]


def _parameters(found: Iterable[Owner]) -> Iterable[nn.Parameter]:
    for owner in found:
        yield from [owner] if isinstance(owner, nn.Parameter) else owner.parameters()


def freeze(backbone: Backbone, names: Sequence[str], path: str) -> None:
    """Let parts (``PARTS``), or parameters whose name a regular expression is found in, not learn.

    Args:
        path: of the model, for messages.

    Raises:
        UserError: a name is no part and fits no parameter.
    """
    frozen: list[nn.Parameter] = []
    for name in names:
        if name in PARTS:
            frozen += parameters_of(name, backbone)
            continue
        try:
            pattern = re.compile(name)
        except re.error as error:
            raise UserError(f"freeze: '{name}' is neither a part nor a regular expression ({error})") from None
        found = [p for n, p in backbone.model.named_parameters() if pattern.search(n)]
        if not found:
            raise UserError(f"freeze: '{name}' fits no parameter of {path} and is no part; {nearest(name, PARTS)}")
        frozen += found
    for parameter in frozen:
        parameter.requires_grad_(False)


def tables(backbone: Backbone) -> dict[str, nn.Parameter]:
    """The tables that have a row for every token: 'embeddings', and 'head' where it is not tied to them."""
    return {part: found[0] for part in ("embeddings", "head") if (found := parameters_of(part, backbone))}


def keep_rows_alive(table: nn.Parameter, rows: Sequence[int]) -> None:
    """Of a frozen table [V, D], let some rows learn.

    The others get no gradient; ``few_rows``, these rows, tells the optimizer that they must not decay either.
    """
    keep = torch.zeros(table.shape[0], 1, dtype=table.dtype).index_fill_(0, torch.tensor(rows), 1)
    table.requires_grad_(True)
    table.few_rows = tuple(rows)  # type: ignore[attr-defined]

    def masked(gradient: Tensor) -> Tensor:
        return gradient * keep.to(gradient.device)

    table.register_hook(masked)
