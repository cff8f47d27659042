"""What an intervention is: a change to the images, to the inputs, or to the latents' states of a question.

The question is otherwise asked as always: the same prompt, the same decoding, the same judge. Anything drawn at random
is drawn from a seed and the question's own name, so that it does not depend on batches or ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from PIL.Image import Image
from torch import Tensor

from laavit.recipe import build_part, cards
from laavit.registry import INTERVENTIONS

if TYPE_CHECKING:
    from laavit.evaluation.generation import Answerer

#: a Hugging Face chat, its images as ``{"type": "image", "image": PIL}``
Chat = list[dict[str, Any]]


class Questions(Sequence["Question"]):
    """All questions of a task, each made when it is asked for.

    Args:
        task: its name. documents: anything with a length.
        make: a question's number -> its document and its chat; raises ``IndexError`` past the last one.
    """

    def __init__(self, task: str, documents: Sized, make: Callable[[int], tuple[Mapping[str, Any], Chat]]) -> None:
        self.task, self.documents, self.make = task, documents, make

    def __len__(self) -> int:
        return len(self.documents)

    @overload
    def __getitem__(self, number: int) -> Question: ...

    @overload
    def __getitem__(self, number: slice) -> list[Question]: ...

    def __getitem__(self, number: int | slice) -> Question | list[Question]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        return Question(self.task, number, *self.make(number), self)

    @classmethod
    def of(cls, chats: Sequence[Chat]) -> Questions:
        """Chats that belong to no task."""
        return cls("", chats, lambda number: ({}, chats[number]))


@dataclass(frozen=True, eq=False)
class Question:
    """One question of a task.

    Args:
        task: its name. number: which one of it (lmms-eval's doc_id). doc: the document, {} of a bare chat.
        chat: what is asked. fellows: all questions of the task.
    """

    task: str
    number: int
    doc: Mapping[str, Any]
    chat: Chat
    fellows: Questions
    _partners: dict[int, Question | None] = field(default_factory=dict, init=False, repr=False)

    @property
    def key(self) -> tuple[str, int]:
        return self.task, self.number

    @property
    def images(self) -> list[Image]:
        """The images in order."""
        return [part["image"] for message in self.chat for part in _parts(message) if part["type"] == "image"]

    def with_images(self, images: Sequence[Image]) -> Chat:
        """The chat with other images in the places of its own."""
        left = iter(images)

        def changed(part: dict[str, Any]) -> dict[str, Any]:
            return part | {"image": next(left)} if part["type"] == "image" else part

        return [
            message
            if isinstance(message["content"], str)
            else message | {"content": list(map(changed, _parts(message)))}
            for message in self.chat
        ]

    def random(self, seed: int) -> np.random.Generator:
        """What draws for this question: a function of the seed and the question's name alone."""
        digest = hashlib.sha256(f"{seed}:{self.task}:{self.number}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))

    def partner(self, seed: int) -> Question | None:
        """Another question of the task, about another image; None where there is none.

        Questions stand in one random circle (``circle``); the partner is the next one whose image differs.
        """
        if seed not in self._partners:
            following, own = circle(len(self.fellows), seed), self._pixels()
            number, self._partners[seed] = following[self.number], None
            while number != self.number:
                other = self.fellows[number]
                if (pixels := other._pixels()) and pixels != own:
                    self._partners[seed] = other
                    break
                number = following[number]
        return self._partners[seed]

    def _pixels(self) -> list[tuple[tuple[int, int], bytes]]:
        return [(image.size, hashlib.blake2b(image.tobytes()).digest()) for image in self.images]


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [] if isinstance(message["content"], str) else message["content"]


@lru_cache(maxsize=16)
def circle(count: int, seed: int) -> tuple[int, ...]:
    """A permutation of ``count`` numbers that is one circle through all of them, as what follows each.

    Nobody is its own successor where there are two or more: a derangement (Sattolo 1986: all circles alike likely).
    """
    order = np.random.default_rng(seed).permutation(count)
    following = np.empty(count, dtype=int)
    following[order] = np.roll(order, -1)
    return tuple(following.tolist())


class Intervention:
    """Changes nothing; a kind of intervention overrides what it changes.

    ``on`` says what is changed: 'latents', 'image' or 'inputs'.
    """

    on = "inputs"

    def lacks(self, model: Answerer, columns: Mapping[str, Sequence[str]]) -> str | None:
        """Why this cannot be done with a model and tasks; None where it can.

        Args:
            model: the loaded bridge. columns: task -> its documents' columns.
        """
        return None

    def applies(self, question: Question) -> bool:
        """Whether this question is changed at all; others are asked as they are, and count in no effect."""
        return True

    def chats(self, questions: Sequence[Question]) -> list[Chat]:
        """What is asked in place of a batch of questions: here their images can be changed."""
        return [question.chat for question in questions]

    def __call__(self, model: Any, inputs: Mapping[str, Tensor], ids: Sequence[int]) -> dict[str, Tensor]:
        """What ``generate`` is given.

        Args:
            model: the Hugging Face model. inputs: the processor's output. ids: the latents' token ids.
        """
        return dict(inputs)

    def states(
        self, model: Answerer, questions: Sequence[Question], inputs: Mapping[str, Tensor]
    ) -> AbstractContextManager[Any]:
        """Open while these inputs are answered: here hooks can change the states inside the model."""
        return nullcontext()


class _Inputs(Intervention):
    """A callable of somebody else's that changes the inputs alone."""

    def __init__(self, inner: Callable[..., dict[str, Tensor]]) -> None:
        self.inner = inner

    def __call__(self, model: Any, inputs: Mapping[str, Tensor], ids: Sequence[int]) -> dict[str, Tensor]:
        return self.inner(model, inputs, ids)


def adapted(part: Any) -> Intervention:
    """Any registered intervention as an ``Intervention``: a plain class with ``__call__`` changes the inputs."""
    return part if isinstance(part, Intervention) else _Inputs(part)


def intervention_of(given: str | Mapping[str, Any]) -> Intervention:
    """A named intervention, or one of a registered class.

    Raises:
        UserError: no such intervention, or arguments it does not take.
    """
    spec = {"name": given} if isinstance(given, str) else dict(given)
    name = str(spec.get("name"))
    if name not in cards("interventions") and INTERVENTIONS.get(name) is not None:
        spec["type"] = spec.pop("name")
    return adapted(build_part("intervention", "interventions", spec))
