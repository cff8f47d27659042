"""What is noted of every question while a batch is answered, beside the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laavit.evaluation.interventions.base import Question
from laavit.evaluation.interventions.effects import kl, latent_shift
from laavit.evaluation.interventions.states import FirstAnswer, LatentStates, Reading, tapped

if TYPE_CHECKING:
    from laavit.evaluation.generation import Answerer


class Observer:
    """Compares each question's reading with the one it had without intervention.

    Args:
        readings: those of the reference, by question.
        centre: of the reference's latents (``centre_of``); None where latents are not compared, as where they are
            replaced themselves.
    """

    def __init__(self, readings: Mapping[tuple[str, int], Reading], centre: Tensor | None) -> None:
        self.readings, self.centre = readings, centre
        #: question -> what was measured; questions that the intervention does not apply to are None
        self.found: dict[tuple[str, int], dict[str, Any] | None] = {}

    @contextmanager
    def watch(
        self, model: Answerer, questions: Sequence[Question], inputs: Mapping[str, Tensor]
    ) -> Iterator[FirstAnswer]:
        """Open while the inputs are answered."""
        first = FirstAnswer(model.markup)
        latents: Sequence[LatentStates | None] = [None] * len(questions)
        if self.centre is not None:
            with tapped(model, inputs, layers=False) as tap:
                yield first
            latents = tap.states
        else:
            yield first
        for question, shares, states in zip(questions, first.log_shares, latents, strict=True):
            changed = model.intervention is None or model.intervention.applies(question)
            self.found[question.key] = self._measured(question, shares, states) if changed else None

    def _measured(self, question: Question, shares: Tensor, states: LatentStates | None) -> dict[str, float | None]:
        reference = self.readings[question.key]
        found: dict[str, float | None] = {"kl": kl(reference.first, shares)}
        if states is not None and reference.latents is not None:
            found["latent_shift"] = latent_shift(reference.latents, states)
            found["latent_shift_centred"] = latent_shift(reference.latents, states, self.centre)
        return found


def centre_of(latents: Sequence[LatentStates]) -> Tensor | None:
    """The mean last state of each latent over the questions that read it, [K, D]; None without latents."""
    if not latents:
        return None
    seen = torch.stack([one.seen for one in latents]).double()  # [n, K]
    total = torch.stack([one.final for one in latents]).double().mul(seen[..., None]).sum(0)
    return total / seen.sum(0).clamp(min=1)[:, None]


@contextmanager
def watching(model: Answerer, questions: Sequence[Question], inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """An intervention on states, and an observer, while a bridge answers a batch; what ``generate`` is given more."""
    with ExitStack() as open_parts:
        if model.intervention is not None:
            open_parts.enter_context(model.intervention.states(model, questions, inputs))
        if model.observer is None:
            yield {}
        else:
            yield {"logits_processor": [open_parts.enter_context(model.observer.watch(model, questions, inputs))]}
