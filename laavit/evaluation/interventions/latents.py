"""Latents zeroed, noised, swapped, replaced by the first or by their mean (after CapImagine, arXiv 2602.22766).

The states are those of a reading without intervention (laavit/evaluation/interventions/states.py): of the question
itself, or of the one whose latents it is given. What is made of them enters every decoder layer in their place, so
that separator and answer read nothing else of the latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from laavit.evaluation.interventions.base import Chat, Intervention, Question
from laavit.evaluation.interventions.states import LatentStates, Tap, read, tapped
from laavit.registry import INTERVENTIONS, UserError

if TYPE_CHECKING:
    from laavit.evaluation.generation import Answerer


class LatentIntervention(Intervention):
    """Replaces the latents' states by what ``replaced`` makes of those of the question that ``donor`` names."""

    on = "latents"

    def lacks(self, model: Answerer, columns: Mapping[str, Sequence[str]]) -> str | None:
        return None if model.layout.most else "the model has no latents"

    def donor(self, question: Question) -> tuple[tuple[str, int] | None, Chat]:
        """Whose states are taken: the key under which they are remembered (None: not at all), and what is read."""
        return question.key, question.chat

    def replaced(self, states: Tensor, question: Question) -> Tensor:
        """The new states [K, L, D] of a question, from the donor's."""
        return states

    @contextmanager
    def states(self, model: Answerer, questions: Sequence[Question], inputs: Mapping[str, Tensor]) -> Iterator[Tap]:
        if not model.layout.most:
            raise UserError("the latents' states cannot be changed: the model has no latents")
        donors = [self.donor(question) for question in questions]
        remembered = model.readings or {}
        if all(key in remembered for key, _ in donors):
            readings = [remembered[key] for key, _ in donors if key is not None]
        else:
            readings = read(model, [chat for _, chat in donors])
        write = [
            self._written(reading.latents, question)
            for reading, question in zip(readings, questions, strict=True)
            if reading.latents is not None
        ]
        with tapped(model, inputs, layers=False, write=write) as tap:
            yield tap

    def _written(self, latents: LatentStates, question: Question) -> LatentStates:
        """Latents that were never read stay out of what the others are given, and are not written."""
        layers = latents.layers.clone()
        if bool(latents.seen.any()):
            layers[latents.seen] = self.replaced(layers[latents.seen], question).to(layers.dtype)
        return replace(latents, layers=layers)


@INTERVENTIONS.register_module()
class ZeroedLatents(LatentIntervention):
    """Zeros: a position without content, which attention still finds."""

    def replaced(self, states: Tensor, question: Question) -> Tensor:
        return torch.zeros_like(states)


@INTERVENTIONS.register_module()
class NoisedLatents(LatentIntervention):
    """Gaussian noise of the state's own norm, another one at every latent and layer.

    Args:
        share: of the noise n; what enters is ``(1 - share) s + share n ‖s‖ / ‖n‖``. seed: of the noise.
    """

    def __init__(self, share: float = 1.0, seed: int = 0) -> None:
        self.share, self.seed = share, seed

    def replaced(self, states: Tensor, question: Question) -> Tensor:
        drawn = question.random(self.seed).standard_normal(tuple(states.shape))
        noise, exact = torch.from_numpy(drawn), states.double()
        noise *= exact.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return (1 - self.share) * exact + self.share * noise


@INTERVENTIONS.register_module()
class SwappedLatents(LatentIntervention):
    """The whole block of latents of another question about another image (``Question.partner``).

    Args:
        seed: of who is given whose; where there is no other image, the question keeps its own.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def applies(self, question: Question) -> bool:
        return question.partner(self.seed) is not None

    def donor(self, question: Question) -> tuple[tuple[str, int] | None, Chat]:
        other = question.partner(self.seed) or question
        return other.key, other.chat


@INTERVENTIONS.register_module()
class FirstLatent(LatentIntervention):
    """The first latent's states in the places of all: is there more in K latents than in one?"""

    def replaced(self, states: Tensor, question: Question) -> Tensor:
        return states[:1].expand_as(states)


@INTERVENTIONS.register_module()
class MeanLatent(LatentIntervention):
    """The mean over the question's latents, layer by layer, in the places of all: do they differ to any effect?"""

    def replaced(self, states: Tensor, question: Question) -> Tensor:
        return states.double().mean(0, keepdim=True).expand_as(states)
