"""Where models look: pictures and statistics, for models of whole images and for models that cut images up."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny
from PIL import Image

from laavit.evaluation.gaze import Looker, check_looker, look, statistics, write_gaze
from laavit.registry import UserError
from laavit.reports.figures import gaze_figures
from laavit.reports.runs import GazeSample
from laavit.structures import Box, Sample, Tile, Trace


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=zoo:b", Looker("a", "zoo:b")),
        ("a=b@latents", Looker("a", "b", ("latents",))),
        ("a=b@header+answer@-2,-1", Looker("a", "b", ("header", "answer"), (-2, -1))),
    ],
)
def test_lookers_are_read(text: str, expected: Looker) -> None:
    assert Looker.parse(text) == expected


@pytest.mark.parametrize("text", ["", "a", "=b", "a=", "a=b@c@d@e", "a=b@latents@two"])
def test_what_is_no_looker_is_named(text: str) -> None:
    with pytest.raises(UserError, match=f"'{text}'"):
        Looker.parse(text)


def test_a_folder_of_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "run" / "export").mkdir(parents=True)
    for folder, message in (
        ("run", "is a run; give its export"),
        ("run/export", "holds no model"),
        ("absent", "there is no folder"),
    ):
        with pytest.raises(UserError, match=f"student: '{tmp_path / folder}' {message}|student: {message}"):
            check_looker(Looker("student", str(tmp_path / folder), ("latents",)))
    check_looker(Looker("student", "someone/model"))  # of the hub


def trace(key: str, gaze: list[float], tiles: tuple[Tile, ...]) -> Trace:
    return Trace(key, "", tiles, torch.tensor(gaze), torch.ones(2), 0.5)


def test_statistics_in_closed_form() -> None:
    """Two samples, one of them without a box; the other's box is the right half, seen by a crop and a thumbnail."""
    crops = (Tile(1, 1, 0, (0, 0, 0.5, 1)), Tile(1, 1, 0, (0.5, 0, 1, 1)), Tile(1, 2))
    traces = [trace("a", [1.0, 3.0, 0.0, 4.0], crops), trace("b", [1.0, 1.0], (Tile(1, 2),))]
    samples = [Sample("a", (Path("a"),), "?", "", (Box(0.5, 0, 1, 1),)), Sample("b", (Path("b"),), "?", "")]
    found = statistics(traces, samples)
    entropies = [math.log(8) / 8 - 3 / 8 * math.log(3 / 8) - 0.5 * math.log(0.5), math.log(2)]
    spread = abs(entropies[0] - entropies[1]) / math.sqrt(2)
    assert found["n"] == 2 and found["entropy"] == pytest.approx([sum(entropies) / 2, spread])
    assert found["salient"][0] == pytest.approx(0.5)  # 4 is above 1.5 times the mean of 2, 3 is not
    assert found["in_box"] == pytest.approx([7 / 8, 7 / 8, 7 / 8])
    assert "in_box" not in statistics(traces[1:], samples[1:])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Samples on a 96 x 64 picture and on another, of two sources."""
    folder, random, found = tmp_path_factory.mktemp("seen"), np.random.default_rng(0), []
    for name, size in (("a", (96, 64)), ("b", (64, 96))):
        path = folder / f"{name}.png"
        Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        found.append(Sample(name, (path,), "What is it?", "blue", (Box(0.5, 0, 1, 1),), source=name))
    return found


def written(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "index.json").read_text(encoding="utf-8"))


def test_one_whole_image_is_drawn_as_its_tokens_are(pair: list[Sample], tiny_folder: Path, tmp_path: Path) -> None:
    looker = Looker("teacher", str(tiny_folder))
    write_gaze(tmp_path, [looker], pair)
    for entry, found in zip(written(tmp_path), look(looker, pair), strict=True):
        (tile,) = found.tiles
        given = entry["maps"]["teacher"]
        assert given["grid"] == [tile.height, tile.width]
        assert given["values"] == [round(float(value), 6) for value in found.gaze]


@pytest.mark.parametrize("family", ["llava_onevision", "internvl"])
def test_an_image_in_tiles_is_drawn_as_one_map(
    family: str, pair: list[Sample], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A thumbnail beside a fine grid, or beside crops: one map over the image, of all of them."""
    looker = Looker("student", str(tiny(family, tmp_path_factory.mktemp(family))))
    traces = look(looker, pair)
    assert all(len(found.tiles) > 1 for found in traces)
    figures = write_gaze(tmp_path, [looker], pair)
    assert figures["student"] == statistics(traces, pair)
    for entry, found, sample in zip(written(tmp_path), traces, pair, strict=True):
        given = entry["maps"]["student"]
        gaze = np.reshape(given["values"], given["grid"])
        assert gaze.size >= max(tile.cells for tile in found.tiles)
        assert gaze.sum() == pytest.approx(float(found.gaze.sum()), abs=1e-3)
        # The page shows it with the share of the drawn map that is inside the box: the tokens', but for the rim.
        shown = GazeSample(sample.id, tmp_path / entry["image"], "", "", [(0.5, 0, 1, 1)], {"student": gaze})
        _, (_, _, share) = gaze_figures(shown, ["student"])
        tokens = sum(  # every token's mass, by how much of its cell lies right of the middle
            float(value) * right
            for part, tile in zip(found.gaze.split([t.cells for t in found.tiles]), found.tiles, strict=True)
            for value, right in zip(part, right_halves(tile), strict=True)
        )
        assert share == pytest.approx(tokens / float(found.gaze.sum()), abs=0.02)


def right_halves(tile: Tile) -> list[float]:
    """How much of each cell of a tile lies in the right half of the image."""
    x1, _, x2, _ = tile.region
    edges = [x1 + (x2 - x1) * j / tile.width for j in range(tile.width + 1)]
    row = [max(0.0, right - max(left, 0.5)) / (right - left) for left, right in itertools.pairwise(edges)]
    return row * tile.height


def test_pictures_are_drawn_upright(tmp_path: Path) -> None:
    """A photograph that its EXIF data turn is shown as the model saw it."""
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    turned = Image.fromarray(pixels).getexif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=turned)
    found = gaze_figures(GazeSample("a", tmp_path / "a.jpg", "", "", [], {"t": np.ones((4, 2))}), ["t"])
    assert len(found) == 2 and {size_of(uri) for _, uri, _ in found} == {(168, 336)}


def size_of(uri: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size


def test_nothing_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sample to look at"):
        write_gaze(tmp_path, [], [])
