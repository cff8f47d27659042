"""Interventions on images: exactly the pixels they say, and who is given whose image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from laavit.evaluation.interventions import (
    BlankImage,
    MaskedImage,
    Question,
    Questions,
    ShuffledImage,
    SwappedImage,
)
from laavit.evaluation.interventions.base import Chat, circle
from laavit.evaluation.interventions.boxes import boxes_of, inside
from laavit.registry import UserError


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def questions(*docs: tuple[dict[str, Any], Sequence[Image.Image]]) -> list[Question]:
    """A task of questions with these documents and images, words before, between and after them."""

    def make(number: int) -> tuple[dict[str, Any], Chat]:
        doc, images = docs[number]
        content: list[dict[str, Any]] = [{"type": "text", "text": "look"}]
        for image in images:
            content += [{"type": "image", "image": image}, {"type": "text", "text": "?"}]
        return doc, [{"role": "system", "content": "words"}, {"role": "user", "content": content}]

    return list(Questions("task", docs, make))


def pixels(chat: Chat) -> list[np.ndarray]:
    return [np.asarray(part["image"]) for part in chat[1]["content"] if part["type"] == "image"]


def test_the_chat_keeps_everything_but_its_images() -> None:
    [question] = questions(({}, [picture(1), picture(2, (20, 10))]))
    chat = question.with_images([picture(3), picture(4)])
    assert [part["type"] for part in chat[1]["content"]] == [part["type"] for part in question.chat[1]["content"]]
    assert chat[0] == question.chat[0] and chat[1]["content"][0] == {"type": "text", "text": "look"}
    for found, wanted in zip(pixels(chat), (picture(3), picture(4)), strict=True):
        assert np.array_equal(found, np.asarray(wanted))
    assert np.array_equal(pixels(question.chat)[0], np.asarray(picture(1)))  # the question itself is left alone


def test_blanked_is_the_mean_colour() -> None:
    image = Image.fromarray(np.array([[[0, 10, 200], [4, 10, 100]], [[0, 10, 0], [0, 10, 3]]], dtype=np.uint8))
    [chat] = BlankImage().chats(questions(({}, [image])))
    assert pixels(chat)[0].tolist() == [[[1, 10, 76]] * 2] * 2  # means 1, 10 and 75.75


def test_shuffled_cells_all_move_and_are_all_there() -> None:
    """Each cell of one grey: the greys of the result are a derangement; the rest of an odd size stays."""
    cells = np.arange(16, dtype=np.uint8).reshape(4, 4).repeat(5, 0).repeat(7, 1)
    image = np.full((22, 30, 3), 99, dtype=np.uint8)
    image[:20, :28] = cells[..., None]
    asked = questions(({}, [Image.fromarray(image)] * 2), ({}, [Image.fromarray(image)]))
    (one, two), (third,) = (pixels(chat) for chat in ShuffledImage(grid=4, seed=0).chats(asked))
    for found in (one, two, third):
        moved = found[:20:5, :28:7, 0]
        assert sorted(moved.flatten().tolist()) == list(range(16))
        assert not np.any(moved == np.arange(16).reshape(4, 4))
        assert np.array_equal(found[:20, :28], moved.repeat(5, 0).repeat(7, 1)[..., None].repeat(3, 2))
        assert np.all(found[20:] == 99) and np.all(found[:, 28:] == 99)
    assert not np.array_equal(one, two) and not np.array_equal(one, third)
    again, other = (pixels(ShuffledImage(4, seed).chats(asked)[0])[0] for seed in (0, 1))
    assert np.array_equal(again, one) and not np.array_equal(other, one)


@pytest.mark.parametrize("count", [2, 3, 7, 50])
def test_a_circle_is_a_derangement_through_all(count: int) -> None:
    for seed in range(5):
        following, seen, number = circle(count, seed), [], 0
        for _ in range(count):
            seen.append(number)
            number = following[number]
        assert number == 0 and sorted(seen) == list(range(count))
        assert all(following[i] != i for i in range(count))
    assert circle(1, 0) == (0,)


def test_swapped_images_are_anothers() -> None:
    """Questions about one image never get it from each other; without another image nothing is swapped."""
    a, b, c = picture(1), picture(2), picture(3, (20, 10))
    asked = questions(({}, [a]), ({}, [a]), ({}, [b]), ({}, [c, a]), ({}, []), ({}, [b]))
    for seed in range(6):
        part = SwappedImage(seed)
        for question, chat in zip(asked, part.chats(asked), strict=True):
            other = question.partner(seed)
            assert other is not None and other.images and other.number != question.number
            own = [np.asarray(image).tolist() for image in question.images]
            theirs = [np.asarray(image).tolist() for image in other.images]
            assert own != theirs
            wanted = [theirs[place % len(theirs)] for place in range(len(own))]
            assert [found.tolist() for found in pixels(chat)] == wanted
        assert [part.applies(question) for question in asked] == [True, True, True, True, False, True]
    assert len({tuple(q.partner(s).number for q in asked) for s in range(6)}) > 1  # type: ignore[union-attr]
    alone = questions(({}, [a]), ({}, [a]))
    assert not SwappedImage().applies(alone[0])
    assert SwappedImage().chats(alone) == [question.chat for question in alone]


@pytest.mark.parametrize("part", ["inside", "outside"])
def test_masked_pixels(part: Any) -> None:
    """A box by hand: columns 2 .. 4 and rows 1 .. 1 of a 6 x 4 image (shares, and COCO's pixels), and two boxes."""
    image = picture(5, (6, 4))
    mean = np.asarray(image).reshape(-1, 3).mean(0).round().astype(np.uint8)
    box = np.zeros((4, 6), dtype=bool)
    box[1, 2:5] = True
    two = box.copy()
    two[3, 0] = True
    docs = [
        ({"boxes": [[2 / 6, 1 / 4, 5 / 6, 2 / 4]]}, box),
        ({"bbox": [2, 1, 3, 1]}, box),
        ({"bbox": [[2, 1, 3, 1]]}, box),
        ({"boxes": [[0.34, 0.26, 0.8, 0.45], [0.0, 0.75, 0.1, 1.0]]}, two),  # centres count
    ]
    for question, (_, where) in zip(questions(*((doc, [image]) for doc, _ in docs)), docs, strict=True):
        [chat] = MaskedImage(part).chats([question])
        where = where if part == "inside" else ~where
        assert np.array_equal(pixels(chat)[0][~where], np.asarray(image)[~where])
        assert np.all(pixels(chat)[0][where] == mean)


def test_questions_without_boxes_are_left_alone() -> None:
    image = picture(1)
    box = [[0.0, 0.0, 0.5, 0.5]]
    asked = questions(({}, [image]), ({"boxes": []}, [image]), ({"boxes": box}, [image] * 2), ({"boxes": box}, []))
    part = MaskedImage("outside")
    assert not any(part.applies(question) for question in asked)
    assert part.chats(asked) == [question.chat for question in asked]
    assert boxes_of({"bbox": None}, (4, 4)) == []
    assert not inside([], (3, 2)).any() and inside([(0, 0, 3, 2)], (3, 2)).all()


def test_a_grid_of_one_is_refused() -> None:
    with pytest.raises(UserError, match="grid: got 1; allowed: whole numbers from 2"):
        ShuffledImage(grid=1)
