"""Samples with boxes on pictures of two shapes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from laavit.structures import Box, Sample


@pytest.fixture(scope="session")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Four samples of two sources, the box is the right half."""
    folder, random, found = tmp_path_factory.mktemp("boxed"), np.random.default_rng(0), []
    questions = ["What is it?", "What colour is left of the circle?", "Is it red?", "How many?"]
    for i, question in enumerate(questions):
        size = ((96, 64), (64, 96))[i % 2]
        path = folder / f"{i}.png"
        Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        answer = ("blue circle", "red", "yes", "the red shape")[i]
        found.append(Sample(str(i), (path,), question, answer, (Box(0.5, 0, 1, 1),), source="ab"[i % 2]))
    return found
