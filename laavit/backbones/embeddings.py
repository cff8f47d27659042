"""What enters a decoder: a model is looked at from outside, whatever its family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def input_embeddings(decoder: nn.Module | None) -> Iterator[list[Tensor]]:
    """The input embeddings [B, S, D] of every pass through a text decoder while this is open, with their graph.

    At image positions they are the projected patches of the vision tower. None is looked at by nobody.
    """
    seen: list[Tensor] = []
    if decoder is None:
        yield seen
        return

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeddings, packing = kwargs["inputs_embeds"], getattr(kwargs.get("laavit"), "packing", None)
        seen.append(embeddings if packing is None else packing.unpack(embeddings))

    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
