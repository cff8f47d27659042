"""Questions about a scene, of kinds that mirror the columns of LaViT's tables, each with the boxes one has to look at.

| kind | mirrors | answers |
|---|---|---|
| colour, shape | V* attributes: find the object first | 6 colours, 4 forms |
| relation | BLINK Spatial Relation | yes, no |
| depth | BLINK Relative Depth (size is the cue) | A, B |
| reflectance | BLINK Relative Reflectance (under uneven light) | A, B |
| count | BLINK IQ-Test and MMStar: several objects at once | one, two, three |

Answers are one word and balanced per kind. A question's boxes come in hops: the first is looked at first. The kinds
of the table have one hop. Those of ``HOP_KINDS`` ask for the colour or the form of a shape that is named by way of
others, "What colour is the object below the object right of the circle?": one to three shapes, a box and a hop each. A
colour is asked from a form on and a form from a colour on, so that the words say nothing of the answer. They are asked
of scenes that are drawn for them (``make_scene`` with ``hops``), and only where they are named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from laavit.microlab.scenes import COUNTS, FORMS, LONGEST_CHAIN, MARKS, Chain, Scene, Shape, chains, only_ones

PixelBox = tuple[int, int, int, int]
NUMBERS = {1: "one", 2: "two", 3: "three"}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}


@dataclass(frozen=True)
class Question:
    """A question, its one-word answer, and the boxes to look at: one tuple of (x1, y1, x2, y2) in pixels a hop.

    ``kind`` is what figures are grouped by: colour and form by way of two shapes are both "two_hop".
    """

    kind: str
    text: str
    answer: str
    hops: tuple[tuple[PixelBox, ...], ...]

    @property
    def boxes(self) -> tuple[PixelBox, ...]:
        """The boxes of all hops, in order, each once."""
        return tuple(dict.fromkeys(box for hop in self.hops for box in hop))


Maker = Callable[[Scene, np.random.Generator], Question]
#: asked of every scene unless others are named
QUESTION_KINDS: dict[str, Maker] = {}
#: of one to three hops; they need scenes that are drawn for them
HOP_KINDS: dict[str, Maker] = {}


def question_kind(name: str, among: dict[str, Maker] = QUESTION_KINDS) -> Callable[[Maker], Maker]:
    """Register a function that asks one question of a scene under the kind's name."""

    def register(make: Maker) -> Maker:
        known = QUESTION_KINDS | HOP_KINDS
        if name in known:
            raise ValueError(f"question kind {name!r} exists already: {known[name].__qualname__}")
        among[name] = make
        return make

    return register


def has_hops(kinds: Sequence[str]) -> bool:
    """Whether a kind among these needs scenes that are drawn for questions of several hops."""
    return not HOP_KINDS.keys().isdisjoint(kinds)


def ask(scene: Scene, kinds: Sequence[str] | None = None, salt: int = 0) -> list[Question]:
    """One question of each kind (``QUESTION_KINDS`` by default); the same scene and salt give the same questions.

    Raises:
        ValueError: unknown kind.
    """
    questions, known = [], QUESTION_KINDS | HOP_KINDS
    for kind in kinds if kinds is not None else QUESTION_KINDS:
        if kind not in known:
            raise ValueError(f"unknown question kind {kind!r}: it is one of {', '.join(known)}")
        # The stream is named by the kind's letters, so that adding a kind does not move the others' draws.
        rng = np.random.default_rng([*scene.seed, salt, int.from_bytes(kind.encode(), "big")])
        questions.append(known[kind](scene, rng))
    return questions


def _pick(rng: np.random.Generator, options: Sequence[Shape]) -> Shape:
    return options[int(rng.integers(len(options)))]


@question_kind("colour")
def colour(scene: Scene, rng: np.random.Generator) -> Question:
    """The colour of the only shape of its form."""
    forms = Counter(shape.form for shape in scene.shapes)
    target = _pick(rng, [shape for shape in scene.shapes if forms[shape.form] == 1])
    return Question("colour", f"What colour is the {target.form}?", target.colour, ((target.box,),))


@question_kind("shape")
def shape(scene: Scene, rng: np.random.Generator) -> Question:
    """The form of the only shape of its colour."""
    colours = Counter(shape.colour for shape in scene.shapes)
    target = _pick(rng, [shape for shape in scene.shapes if colours[shape.colour] == 1])
    return Question("shape", f"What shape is the {target.colour} object?", target.form, ((target.box,),))


@question_kind("relation")
def relation(scene: Scene, rng: np.random.Generator) -> Question:
    """Whether A is left of, right of, above or below B; the answer is drawn first, then a direction that fits it."""
    first, second = (scene.marked(mark) for mark in MARKS)
    holds = []
    if first.column != second.column:
        holds.append(("left of", "right of") if first.column < second.column else ("right of", "left of"))
    if first.row != second.row:
        holds.append(("above", "below") if first.row < second.row else ("below", "above"))
    true, false = holds[int(rng.integers(len(holds)))]
    yes = bool(rng.integers(2))
    return Question("relation", f"Is A {true if yes else false} B?", "yes" if yes else "no", _both(scene))


@question_kind("depth")
def depth(scene: Scene, rng: np.random.Generator) -> Question:
    """Which of the marked shapes is closer, that is larger."""
    answer = next(mark for mark in MARKS if scene.marked(mark).size == "large")
    return Question("depth", "Which is closer, A or B?", answer, _both(scene))


@question_kind("reflectance")
def reflectance(scene: Scene, rng: np.random.Generator) -> Question:
    """Which of the marked shapes reflects more of the light that falls on it."""
    answer = next(mark for mark in MARKS if scene.marked(mark).tone == "light")
    return Question("reflectance", "Which is lighter, A or B?", answer, _both(scene))


@question_kind("count")
def count(scene: Scene, rng: np.random.Generator) -> Question:
    """How many shapes have a form or a colour; the number is drawn first, then what to count."""
    number = COUNTS[int(rng.integers(len(COUNTS)))]
    groups: dict[str, list[Shape]] = {}
    for item in scene.shapes:
        groups.setdefault(item.form, []).append(item)
        groups.setdefault(item.colour, []).append(item)
    names = [name for name, members in groups.items() if len(members) == number]
    name = names[int(rng.integers(len(names)))]
    counted = PLURALS[name] if name in FORMS else f"{name} objects"
    boxes = tuple(member.box for member in groups[name])
    return Question("count", f"How many {counted} are there?", NUMBERS[number], (boxes,))


def _by_way_of(attribute: str, length: int, scene: Scene, rng: np.random.Generator) -> Question:
    """The ``attribute``, "colour" or "form", of the last shape of a chain of ``length``.

    The chain begins at the only shape of its form where a colour is asked, of its colour where a form is.
    """
    named = "form" if attribute == "colour" else "colour"
    found = [chain for start in only_ones(scene.shapes, named) for chain in chains(scene.shapes, start, length)]
    chain: Chain = found[int(rng.integers(len(found)))]
    first, last = chain.shapes[0], chain.shapes[-1]
    way = "".join(f"object {step} the " for step in reversed(chain.steps))
    name = first.form if named == "form" else f"{first.colour} object"
    text = f"What {'colour' if attribute == 'colour' else 'shape'} is the {way}{name}?"
    boxes = tuple((shape.box,) for shape in chain.shapes)
    return Question(f"{NUMBERS[length]}_hop", text, getattr(last, attribute), boxes)


for _length in range(1, LONGEST_CHAIN + 1):
    for _asked, _word in (("colour", "colour"), ("form", "shape")):
        question_kind(f"{NUMBERS[_length]}_hop_{_word}", HOP_KINDS)(partial(_by_way_of, _asked, _length))


def _both(scene: Scene) -> tuple[tuple[PixelBox, ...], ...]:
    return (tuple(scene.marked(mark).box for mark in MARKS),)
