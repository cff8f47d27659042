"""Images blanked, shuffled and swapped: PIL images are changed before any processor, so any family is served."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from laavit.evaluation.interventions.base import Chat, Intervention, Question, circle
from laavit.registry import INTERVENTIONS, UserError


class ImageIntervention(Intervention):
    """Replaces a question's images by what ``changed`` makes of them."""

    on = "image"

    def applies(self, question: Question) -> bool:
        return bool(question.images)

    def changed(self, question: Question) -> Sequence[Image.Image]:
        """One image in the place of each of the question's own."""
        return question.images

    def chats(self, questions: Sequence[Question]) -> list[Chat]:
        return [
            question.with_images(self.changed(question)) if self.applies(question) else question.chat
            for question in questions
        ]


def mean_colour(image: Image.Image) -> tuple[int, int, int]:
    """The mean over an image's pixels, rounded to 0 .. 255."""
    red, green, blue = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0).round().astype(int).tolist()
    return red, green, blue


@INTERVENTIONS.register_module()
class BlankImage(ImageIntervention):
    """Every pixel is the image's mean colour: its size and its brightness are left."""

    def changed(self, question: Question) -> list[Image.Image]:
        return [Image.new("RGB", image.size, mean_colour(image)) for image in question.images]


@INTERVENTIONS.register_module()
class ShuffledImage(ImageIntervention):
    """The image is cut into ``grid`` x ``grid`` cells, and no cell stays where it was: what is there, but not where.

    Pixels past the last whole cell stay.

    Args:
        grid: cells a side, from 2. seed: of the order.
    """

    def __init__(self, grid: int = 4, seed: int = 0) -> None:
        if grid < 2:
            raise UserError(f"intervention.grid: got {grid}; allowed: whole numbers from 2")
        self.grid, self.seed = grid, seed

    def changed(self, question: Question) -> list[Image.Image]:
        random = question.random(self.seed)
        return [self._shuffled(image, int(random.integers(2**31))) for image in question.images]

    def _shuffled(self, image: Image.Image, seed: int) -> Image.Image:
        pixels = np.array(image.convert("RGB"))
        height, width = pixels.shape[0] // self.grid, pixels.shape[1] // self.grid
        cells = [
            (slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
            for row in range(self.grid)
            for column in range(self.grid)
        ]
        found = pixels.copy()
        for cell, other in zip(cells, circle(len(cells), seed), strict=True):
            found[cell] = pixels[cells[other]]
        return Image.fromarray(found)


@INTERVENTIONS.register_module()
class SwappedImage(ImageIntervention):
    """The images of another question, about another image (``Question.partner``), taken in turn.

    Args:
        seed: of who is given whose.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def applies(self, question: Question) -> bool:
        return bool(question.images) and question.partner(self.seed) is not None

    def changed(self, question: Question) -> list[Image.Image]:
        other = question.partner(self.seed)
        given = other.images if other is not None else question.images
        return [given[place % len(given)] for place in range(len(question.images))]
