"""The latents' states, read and replaced from outside while a model answers.

What later positions read of a latent are its keys and values, and each decoder layer makes them of the state that
enters it there. So a latent is read, and replaced, at the entrance of every layer: what its own layers would have made
of it is overwritten before anybody sees it. All other positions enter as they are. Of latents that are fed back, the
state that enters the first layer is what was fed back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laavit.latents import LATENT_TOKENS

if TYPE_CHECKING:
    from laavit.evaluation.generation import Answerer
    from laavit.evaluation.interventions.base import Chat


def latent_ids(tokenizer: Any) -> list[int]:
    """The ids of ``<|latent_1|>``, ``<|latent_2|>``, …, as far as the tokenizer knows them; [] for a stock model."""
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    while (token := LATENT_TOKENS.format(len(ids) + 1)) in vocabulary:
        ids.append(vocabulary[token])
    return ids


@dataclass(frozen=True)
class LatentStates:
    """What one question's K latents hold.

    Args:
        layers: [K, L, D], the states that enter the L decoder layers; L is 0 where they were not asked for.
        final: [K, D], after the decoder's final norm.
        seen: bool [K], the latents that were read at all (a model that writes them itself may leave some out).
    """

    layers: Tensor
    final: Tensor
    seen: Tensor

    @property
    def last(self) -> LatentStates:
        """The same without the layers' states, which take the memory."""
        return replace(self, layers=self.layers[:, :0])


@dataclass
class Tap:
    """Where latents stand in every pass through a decoder, and what is read and written there.

    Args:
        ids: long [K], the latents' token ids. prompt: long [B, S], tokens of the prompts.
        markup: long [M], latents and separator of a model that writes them itself, else empty: what it writes before
            its first word are its latents, each where it comes first.
        layers: whether the states of every layer are kept, and not only the last ones.
        write: what enters the layers in place of the latents' own states; None replaces nothing.
    """

    ids: Tensor
    prompt: Tensor
    markup: Tensor
    layers: bool = True
    write: Sequence[LatentStates] | None = None
    _read: dict[int, Tensor] = field(default_factory=dict, init=False)
    _final: Tensor | None = field(default=None, init=False)
    _seen: Tensor = field(init=False)
    _unworded: Tensor = field(init=False)
    _tokens: Tensor = field(init=False)
    _here: tuple[Tensor, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        self._seen = torch.zeros(len(self.prompt), len(self.ids), dtype=torch.bool, device=self.prompt.device)
        self._unworded = torch.ones(len(self.prompt), dtype=torch.bool, device=self.prompt.device)
        self._tokens = self.prompt
        if self.write is not None:
            # [B, K, L, D] and bool [B, K]
            self._new = torch.stack([states.layers for states in self.write]).to(self.prompt.device)
            self._known = torch.stack([states.seen for states in self.write]).to(self.prompt.device)

    @property
    def states(self) -> list[LatentStates]:
        """What was read, question by question, on the CPU."""
        assert self._final is not None, "the decoder ran while this was open"
        layers = [self._read[layer] for layer in sorted(self._read)]
        stacked = torch.stack(layers, 2).cpu() if layers else self._final[:, :, None][:, :, :0].cpu()
        return [LatentStates(*one) for one in zip(stacked, self._final.cpu(), self._seen.cpu(), strict=True)]

    def of_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a step of ``generate``: which tokens it reads."""
        self._tokens = kwargs["input_ids"]

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a pass through the decoder: (row, column, latent) of every latent in it, each long [M]."""
        count, cache = kwargs["inputs_embeds"].shape[1], kwargs.get("past_key_values")
        start = cache.get_seq_length() if cache is not None else 0
        if start + count <= self.prompt.shape[1]:
            found = self.prompt[:, start : start + count, None] == self.ids
        else:  # a token that the model wrote
            self._unworded &= torch.isin(self._tokens[:, -1], self.markup)
            found = (self._tokens[:, -1:, None] == self.ids) & self._unworded[:, None, None] & ~self._seen[:, None]
        self._here = torch.nonzero(found, as_tuple=True)
        self._seen[self._here[0], self._here[2]] = True

    def enter(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Before a layer: read what enters it at the latents, and write what is to enter in its place."""
        rows, columns, latents = self._here
        if not len(rows):
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if self.layers:
            kept = self._read.setdefault(layer, hidden.new_zeros(len(self.prompt), len(self.ids), hidden.shape[-1]))
            kept[rows, latents] = hidden[rows, columns]
        if self.write is None:
            return None
        known = self._known[rows, latents]
        rows, columns, latents = rows[known], columns[known], latents[known]
        hidden = hidden.clone()
        hidden[rows, columns] = self._new[rows, latents, layer].to(hidden.dtype)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a pass: the states past the final norm."""
        rows, columns, latents = self._here
        hidden: Tensor = output.last_hidden_state
        if self._final is None:
            self._final = hidden.new_zeros(len(self.prompt), len(self.ids), hidden.shape[-1])
        self._final[rows, latents] = hidden[rows, columns]


@contextmanager
def tapped(
    model: Answerer,
    inputs: Mapping[str, Tensor],
    layers: bool = True,
    write: Sequence[LatentStates] | None = None,
) -> Iterator[Tap]:
    """A ``Tap`` on the decoder of a bridge while it answers these inputs."""
    tokens, decoder = inputs["input_ids"], model.decoder
    ids, markup = (tokens.new_tensor(some) for some in (model.latent_ids[: model.most_latents], sorted(model.markup)))
    tap = Tap(ids, tokens, markup, layers, write)
    handles = [
        model.model.register_forward_pre_hook(tap.of_model, with_kwargs=True),
        decoder.register_forward_pre_hook(tap.begin, with_kwargs=True),
        decoder.register_forward_hook(tap.end),
    ]
    for number, layer in enumerate(decoder.layers if layers or write is not None else ()):
        handles.append(layer.register_forward_pre_hook(_entrance(tap, number), with_kwargs=True))
    try:
        yield tap
    finally:
        for handle in handles:
            handle.remove()


def _entrance(tap: Tap, layer: int) -> Any:
    return lambda module, args, kwargs: tap.enter(layer, args, kwargs)


class FirstAnswer:
    """A logits processor that changes nothing and keeps the distribution of each answer's first token.

    Args:
        markup: ids of latents and separator where the model writes them itself: they are no part of an answer.
    """

    def __init__(self, markup: set[int]) -> None:
        self.markup = markup
        self.logits: Tensor | None = None  # [B, V]
        self._open: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.logits is None or self._open is None:
            self.logits, self._open = scores.float(), torch.ones_like(scores[:, 0], dtype=torch.bool)
        else:
            self.logits = torch.where(self._open[:, None], scores.float(), self.logits)
        if self.markup:
            chosen = scores.argmax(-1)
            self._open &= torch.isin(chosen, torch.tensor(sorted(self.markup), device=chosen.device))
        else:
            self._open &= False
        return scores

    @property
    def log_shares(self) -> Tensor:
        """Natural logarithms of the probabilities, float32 [B, V], on the CPU: among words, -inf at ``markup``.

        A model that is kept from writing its latents gives them none, one that may write them some: compared over
        everything, the two would be infinitely far apart.
        """
        assert self.logits is not None, "generate ran"
        logits = self.logits.clone()
        logits[:, sorted(self.markup)] = -torch.inf
        return logits.log_softmax(-1).cpu()


@dataclass(frozen=True)
class Reading:
    """How a model reads a question: its latents' states, and how its answer begins.

    Args:
        latents: None of a model without any. first: log-probabilities [V] of the answer's first token.
    """

    latents: LatentStates | None
    first: Tensor


@torch.inference_mode()
def read(model: Answerer, chats: Sequence[Chat]) -> list[Reading]:
    """Readings of chats, as one batch; nothing is answered past the first token."""
    inputs, first = model.prepared(chats), FirstAnswer(model.markup)
    if not model.layout.most:
        model.generate(inputs, 1, logits_processor=[first])
        return [Reading(None, one) for one in first.log_shares]
    with tapped(model, inputs) as tap:
        model.generate(inputs, 1, logits_processor=[first])
    return [Reading(*one) for one in zip(tap.states, first.log_shares, strict=True)]
