"""Images pass the vision tower once, and what was kept answers as what was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from laavit.evaluation.bridge import Laavit, Settings
from laavit.registry import INTERVENTIONS

SETTINGS = Settings(max_new_tokens=6, until=())


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def chat(question: str, *images: Image.Image) -> list[dict]:
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def asked() -> list[list[dict]]:
    """Six questions on three images; pictures are made anew, as a task makes them for every question."""
    return [
        chat("how many ?", picture(0)),
        chat("what colour is left of the red circle ?", picture(1, (64, 64))),
        chat("yes or no ?"),
        chat("is one left of two ?", picture(1, (64, 64)), picture(0)),
        chat("how many circle ?", picture(0)),
        chat("is the square left of the circle ?", picture(2), picture(2)),
    ]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens a bridge and counts what passes its tower: the number of images of each pass."""

    def opened(folder: Path, **arguments: Any) -> tuple[Laavit, list[int]]:
        model, passes = Laavit(str(folder), **arguments), []
        tower = model.model.model.visual
        tower.register_forward_pre_hook(
            lambda _, args, kwargs: passes.append(len(kwargs["grid_thw"])), with_kwargs=True
        )
        return model, passes

    return opened


def answers(model: Laavit, chats: list[Any]) -> list[str]:
    return [answer.text for answer in model.answer(chats, SETTINGS)]


def test_every_image_passes_the_tower_once(export: Path, seen: Any) -> None:
    model, passes = seen(export)
    plain, all_passes = seen(export, feature_cache_mb=0)
    first, rest = asked()[:4], asked()[4:]
    found = [*answers(model, first), *answers(model, rest), *answers(model, rest)]
    assert passes == [2, 1]  # images 0 and 1, then 2; both are kept after that
    assert (model.features.misses, model.features.hits) == (3, 2 + 2 + 3)
    assert found == [*answers(plain, first), *answers(plain, rest), *answers(plain, rest)]
    assert sum(all_passes) == 4 + 3 + 3 and len(set(found)) > 2


def test_kept_features_are_the_tower_s(export: Path) -> None:
    """float64: what generate is handed over is what it would have made, whatever stood beside it."""
    model = Laavit(str(export))
    model.model.double()
    chats = asked()
    with torch.inference_mode():
        model._prepared(chats[:2])
        handed = model._prepared(chats)["mm_encoder_outputs"]["image"].pooler_output
        plain = model.encode(chats)
        made = model.features.family.image_features(model.model, plain)
    assert len(handed) == len(made) == 7
    for ours, theirs in zip(handed, made, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_full_cache_lets_the_oldest_go(export: Path, seen: Any) -> None:
    """Room for one image of 4 x 4 tokens and none beside it: the answers stay the same."""
    model, passes = seen(export)
    model.features.limit = 16 * 32 * 4
    chats = asked()
    one_by_one = [answers(model, [chats[i]])[0] for i in (0, 4, 1, 1, 0)]
    assert passes == [1, 1, 1]  # 0, then 1 in its place, then 0 again
    assert one_by_one == [answers(Laavit(str(export)), [chats[i]])[0] for i in (0, 4, 1, 1, 0)]
    model.clean()
    answers(model, [chats[0]])
    assert passes == [1, 1, 1, 1]


class Darker:
    """Changes the pixels: in place, in a copy, or not at all."""

    def __init__(self, way: str) -> None:
        self.way = way

    def __call__(self, model: Any, inputs: dict[str, Any], ids: Any) -> dict[str, Any]:
        if self.way == "in place":
            inputs["pixel_values"].mul_(0)
            return inputs
        return {**inputs, "pixel_values": inputs["pixel_values"] * (0 if self.way == "copy" else 1)}


@pytest.mark.parametrize("way", ["in place", "copy", "same"])
def test_changed_images_are_seen_changed(export: Path, seen: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept features stand in for images that nobody changed, and for no others."""
    monkeypatch.setitem(INTERVENTIONS._module_dict, "Darker", Darker)
    intervention = {"name": "Darker", "way": way}
    model, passes = seen(export, intervention=intervention)
    found, again = answers(model, asked()), answers(model, asked())
    plain = answers(Laavit(str(export), intervention=intervention, feature_cache_mb=0), asked())
    untouched = answers(Laavit(str(export)), asked())
    assert found == again == plain
    assert (plain == untouched) == (way == "same")
    assert passes == ([3] if way == "same" else [7, 7])


def test_stock_models_and_other_dtypes(stock: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        model, plain = Laavit(str(stock), dtype=dtype), Laavit(str(stock), dtype=dtype, feature_cache_mb=0)
        for _ in range(2):
            assert answers(model, asked()) == answers(plain, asked())
