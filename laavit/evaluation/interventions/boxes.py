"""What lies inside the ground-truth boxes, and what outside: images masked there, and latents of such images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from laavit.evaluation.interventions.base import Chat, Question
from laavit.evaluation.interventions.images import ImageIntervention, mean_colour
from laavit.evaluation.interventions.latents import LatentIntervention
from laavit.registry import INTERVENTIONS

if TYPE_CHECKING:
    from laavit.evaluation.generation import Answerer

#: columns that hold boxes: corners as shares of the image (laavit's own), or x, y, width, height in pixels (COCO's)
CORNERS, COCO = "boxes", "bbox"


def boxes_of(doc: Mapping[str, Any], size: tuple[int, int]) -> list[tuple[float, float, float, float]]:
    """The boxes of a document as corners (left, top, right, bottom) in pixels; [] where it has none.

    Args:
        doc: with a column ``boxes`` ([[x1, y1, x2, y2], ...] as shares of the image) or ``bbox`` ([x, y, width,
            height] in pixels, or several of them: COCO, RefCOCO). size: of the image, (width, height) in pixels.
    """
    width, height = size
    if doc.get(CORNERS):
        return [(x1 * width, y1 * height, x2 * width, y2 * height) for x1, y1, x2, y2 in doc[CORNERS]]
    found = doc.get(COCO) or []
    found = [found] if len(found) == 4 and not isinstance(found[0], Sequence) else found
    return [(x, y, x + w, y + h) for x, y, w, h in found]


def inside(boxes: Sequence[tuple[float, float, float, float]], size: tuple[int, int]) -> np.ndarray:
    """Which pixels have their centre in a box, bool [height, width]."""
    x, y = np.arange(size[0])[None] + 0.5, np.arange(size[1])[:, None] + 0.5
    found = np.zeros((size[1], size[0]), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        found |= (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)
    return found


def masked(image: Image.Image, where: np.ndarray) -> Image.Image:
    """The image with its mean colour where ``where``, bool [height, width], says."""
    pixels = np.array(image.convert("RGB"))
    pixels[where] = mean_colour(image)
    return Image.fromarray(pixels)


def boxed(question: Question) -> bool:
    """Whether a question has boxes and one image, which is theirs."""
    images = question.images
    return len(images) == 1 and bool(boxes_of(question.doc, images[0].size))


def no_boxes(columns: Mapping[str, Sequence[str]]) -> str | None:
    """Why no task has boxes, from the columns of its documents; None where one has."""
    if any({CORNERS, COCO} & set(names) for names in columns.values()):
        return None
    return f"the documents of {', '.join(columns)} have no column '{CORNERS}' or '{COCO}'"


def without(question: Question, part: str) -> Image.Image:
    """The question's image, masked inside or outside its boxes."""
    [image] = question.images
    where = inside(boxes_of(question.doc, image.size), image.size)
    return masked(image, where if part == "inside" else ~where)


@INTERVENTIONS.register_module()
class MaskedImage(ImageIntervention):
    """The image's mean colour inside the ground-truth boxes, or outside of them.

    Args:
        part: what is masked: 'inside' takes away what the answer rests on, 'outside' everything else.
    """

    def __init__(self, part: Literal["inside", "outside"] = "inside") -> None:
        self.part = part

    def lacks(self, model: Answerer, columns: Mapping[str, Sequence[str]]) -> str | None:
        return no_boxes(columns)

    def applies(self, question: Question) -> bool:
        return boxed(question)

    def changed(self, question: Question) -> list[Image.Image]:
        return [without(question, self.part)]


@INTERVENTIONS.register_module()
class OracleLatents(LatentIntervention):
    """The latents' states of the same model that is shown the inside of the ground-truth boxes alone.

    The question itself is asked of the whole image; its latents come from a reading of the same question in which the
    image is masked outside the boxes. Latents that carry what the answer rests on are as good or better then.
    """

    def lacks(self, model: Answerer, columns: Mapping[str, Sequence[str]]) -> str | None:
        return super().lacks(model, columns) or no_boxes(columns)

    def applies(self, question: Question) -> bool:
        return boxed(question)

    def donor(self, question: Question) -> tuple[tuple[str, int] | None, Chat]:
        if not boxed(question):
            return question.key, question.chat
        return None, question.with_images([without(question, "outside")])
