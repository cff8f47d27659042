"""Procedural 96 x 96 scenes with known boxes, deterministic per (seed, index).

A scene is a 3 x 3 grid of cells with 4-7 shapes, each in its own cell. A shape has a colour, a form, a size (the cue
for depth: larger is closer) and a brightness (its reflectance). Two shapes carry the marks A and B; they always differ
in size and in brightness, so that comparing them has an answer. An illumination ramp over the whole image keeps
brightness from being readable off a single pixel, and gives every patch a trace of where it stands: multi-axis rotary
positions put no absolute position into an attention layer's values. Lengths are in pixels, brightness in [0, 1].
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

#: Grows with every change to what is drawn or asked, so that no folder mixes two ways of drawing.
SCENES_VERSION = 1
IMAGE_SIZE = 96
GRID = 3
CELL = IMAGE_SIZE // GRID
MARK_MARGIN = 2  # from the cell's upper left corner

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.20, 0.30, 0.95),
    "yellow": (0.92, 0.85, 0.15),
    "purple": (0.70, 0.20, 0.85),
    "cyan": (0.15, 0.80, 0.85),
}
FORMS: tuple[str, ...] = ("circle", "square", "triangle", "cross")
SIZES: dict[str, int] = {"small": 7, "large": 12}  # radius
TONES: dict[str, float] = {"dark": 0.5, "light": 1.0}  # reflectance
MARKS: tuple[str, str] = ("A", "B")
BACKGROUND = 0.42
NOISE = 0.03
RAMP = 0.3  # the darkest corner's loss of light
JITTER = 2
COUNTS = (1, 2, 3)
#: direction -> (rows, columns) to the neighbouring cell
DIRECTIONS: dict[str, tuple[int, int]] = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
#: the most shapes that a question leads over, from one to its neighbour
LONGEST_CHAIN = 3

_GLYPHS = {
    "A": ("01110", "10001", "10001", "11111", "10001", "10001", "10001"),
    "B": ("11110", "10001", "10001", "11110", "10001", "10001", "11110"),
}


@dataclass(frozen=True)
class Shape:
    """One shape: its cell (row * 3 + column), names of its attributes, and its offset (x, y) from the cell's centre."""

    cell: int
    colour: str
    form: str
    size: str
    tone: str
    offset: tuple[int, int] = (0, 0)

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x1, y1, x2, y2) in pixels: the cell, so that with a token every 16 px it is exactly 2 x 2 tokens."""
        x, y = self.column * CELL, self.row * CELL
        return x, y, x + CELL, y + CELL


@dataclass(frozen=True)
class Scene:
    """Shapes, the indices of those marked A and B, the direction the light comes from (radians), and its own seed."""

    shapes: tuple[Shape, ...]
    marks: tuple[int, int]
    light: float
    seed: tuple[int, int]

    def marked(self, mark: str) -> Shape:
        """The shape that carries a mark, "A" or "B"."""
        return self.shapes[self.marks[MARKS.index(mark)]]


@dataclass(frozen=True)
class Chain:
    """Shapes of which each stands beside the one before, and where: ``steps[i]`` leads to ``shapes[i + 1]``."""

    shapes: tuple[Shape, ...]
    steps: tuple[str, ...] = ()


def chains(shapes: Sequence[Shape], start: Shape, length: int) -> list[Chain]:
    """Every chain of ``length`` different shapes from ``start``, each in the cell next to the one before."""
    cells = {(shape.row, shape.column): shape for shape in shapes}
    found = [Chain((start,))]
    for _ in range(length - 1):
        longer = []
        for chain in found:
            last = chain.shapes[-1]
            for word, (down, right) in DIRECTIONS.items():
                beside = cells.get((last.row + down, last.column + right))
                if beside is not None and beside not in chain.shapes:
                    longer.append(Chain((*chain.shapes, beside), (*chain.steps, word)))
        found = longer
    return found


def only_ones(shapes: Sequence[Shape], attribute: str) -> list[Shape]:
    """The shapes whose ``attribute``, "form" or "colour", no other shape has."""
    counts = Counter(getattr(shape, attribute) for shape in shapes)
    return [shape for shape in shapes if counts[getattr(shape, attribute)] == 1]


def make_scene(seed: int, index: int, hops: bool = False) -> Scene:
    """The scene number ``index`` of the sequence ``seed``; the same arguments give the same scene on any machine.

    Drawn by rejection until every kind of question has its subject: a form and a colour that occur once, a form or
    colour for each count of 1, 2 and 3, and two shapes that differ in size and in tone.

    Args:
        hops: a scene for questions of several hops, too: of 6 or 7 shapes, where a chain of three begins at a form and
            at a colour that occur once. Another sequence than the one without.
    """
    rng = np.random.default_rng([seed, index, 2] if hops else [seed, index])
    while True:
        shapes = _draw_shapes(rng, 6 if hops else 4)
        if hops and not all(
            any(chains(shapes, start, LONGEST_CHAIN) for start in only_ones(shapes, attribute))
            for attribute in ("form", "colour")
        ):
            continue
        pairs = [
            (i, j)
            for i, first in enumerate(shapes)
            for j, second in enumerate(shapes)
            if first.size != second.size and first.tone != second.tone
        ]
        forms = Counter(shape.form for shape in shapes)
        colours = Counter(shape.colour for shape in shapes)
        counts = set(forms.values()) | set(colours.values())
        if pairs and 1 in forms.values() and 1 in colours.values() and counts.issuperset(COUNTS):
            marks = pairs[int(rng.integers(len(pairs)))]
            return Scene(tuple(shapes), marks, float(rng.uniform(0, 2 * math.pi)), (seed, index))


def _draw_shapes(rng: np.random.Generator, least: int) -> list[Shape]:
    number = int(rng.integers(least, 8))
    cells = rng.permutation(GRID * GRID)[:number]
    colours = rng.integers(len(COLOURS), size=number)
    forms = rng.integers(len(FORMS), size=number)
    sizes, tones = rng.integers(2, size=(2, number))
    offsets = rng.integers(-JITTER, JITTER + 1, size=(number, 2))
    return [
        Shape(
            cell=int(cells[i]),
            colour=tuple(COLOURS)[colours[i]],
            form=FORMS[forms[i]],
            size=tuple(SIZES)[sizes[i]],
            tone=tuple(TONES)[tones[i]],
            offset=(int(offsets[i, 0]), int(offsets[i, 1])),
        )
        for i in range(number)
    ]


@lru_cache(maxsize=1024)
def _stencil(form: str, radius: int, offset: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels of a form in its cell, bool [32, 32]."""
    y, x = np.mgrid[0:CELL, 0:CELL] + 0.5
    x, y = x - CELL / 2 - offset[0], y - CELL / 2 - offset[1]
    if form == "circle":
        return x**2 + y**2 <= radius**2
    if form == "square":
        return np.maximum(abs(x), abs(y)) <= radius * 0.88
    if form == "triangle":
        return (y <= radius * 0.8) & (abs(x) <= (y + radius) * 0.56)
    if form == "cross":
        arm = radius * 0.34
        return (np.minimum(abs(x), abs(y)) <= arm) & (np.maximum(abs(x), abs(y)) <= radius)
    raise ValueError(f"unknown form {form!r}: it is one of {', '.join(FORMS)}")


@lru_cache(maxsize=2)
def _glyph(mark: str) -> NDArray[np.float64]:
    """A mark's picture: white strokes on a black plate, [9, 7, 1]."""
    strokes = np.array([[float(bit) for bit in line] for line in _GLYPHS[mark]])
    return np.pad(strokes, 1)[:, :, None]


def render(scene: Scene) -> NDArray[np.uint8]:
    """The scene's picture, uint8 [96, 96, 3]."""
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND)
    for shape in scene.shapes:
        y, x = shape.row * CELL, shape.column * CELL
        cell = image[y : y + CELL, x : x + CELL]
        cell[_stencil(shape.form, SIZES[shape.size], shape.offset)] = (
            np.array(COLOURS[shape.colour]) * TONES[shape.tone]
        )
    axis = np.linspace(-1, 1, IMAGE_SIZE)
    slope = axis[:, None] * math.sin(scene.light) + axis[None, :] * math.cos(scene.light)
    image *= (1 - RAMP / 2 + RAMP / 2 * slope / math.sqrt(2))[:, :, None]
    for mark in MARKS:
        x, y = (corner + MARK_MARGIN for corner in scene.marked(mark).box[:2])
        glyph = _glyph(mark)
        image[y : y + glyph.shape[0], x : x + glyph.shape[1]] = glyph
    rng = np.random.default_rng([*scene.seed, 1])
    image += NOISE * rng.standard_normal(image.shape, dtype=np.float32)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)
