"""The contract of a teacher: what the extraction (``engine.py``) asks of one, and nothing else.

A teacher is any model that can be looked into: a Hugging Face vision-language model (``hf.py``), or a static image
encoder as the control. What is read off it is data, ``ExtractSettings``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from laavit.registry import UserError
from laavit.structures import Sample, Trace
from laavit.teachers.settings import ExtractSettings


class SampleError(UserError):
    """What the teacher cannot read of one sample of a batch; an extraction puts the sample aside and goes on."""

    def __init__(self, sample_id: str, reason: str) -> None:
        super().__init__(reason)
        self.sample_id = sample_id


class Preparer(Protocol):
    """Turns a sample into what the teacher reads. Picklable and without the model, so that data workers can run it."""

    def __call__(self, sample: Sample) -> Any:
        """Open the sample's images and tokenise its words.

        Raises:
            UserError: this sample cannot be read; the extraction puts it aside with this reason and goes on.
        """
        ...


class Extractor(Protocol):
    """Reads traces off prepared samples, one batch a call, on the teacher's device."""

    preparer: Preparer

    def __call__(self, prepared: Sequence[Any]) -> list[Trace]:
        """The traces of one batch, in its order.

        Raises:
            SampleError: one of the samples has no trace; the batch is read again without it.
        """
        ...


class Teacher(Protocol):
    """A frozen model by name.

    A class may say ``static = True`` (it sees no words), and have a class method ``check_settings(settings)``, which
    refuses an extraction that it cannot follow before anything is loaded.

    Attributes:
        path: the folder or the name that it was read from.
    """

    path: str

    def card(self) -> dict[str, Any]:
        """What a store's header says of the teacher: ``teacher``, ``weights_sha256``, ``processor``, ``width``, ..."""
        ...

    def extractor(self, settings: ExtractSettings) -> Extractor: ...
