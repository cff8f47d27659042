"""Batches: equal settings, the longest first; lengths are those of the prompts that the processor makes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageColumn
from families import FAMILY_NAMES, tiny
from lmms_eval.api.instance import Instance
from PIL import Image

from laavit.evaluation.batching import batches, prompt_lengths
from laavit.evaluation.bridge import Laavit, Settings

SHORT, LONG = Settings(2, ()), Settings(12, ("x",))
#: families whose processors count an image's tokens as they write them, but for what stands around them, at most
EXACT, AROUND = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl", "gemma3", "llava"}, 6
SIZES = [(40, 30), (100, 60), (30, 100), (60, 60)]


def test_equal_settings_stand_together_the_longest_first() -> None:
    settings = [SHORT, LONG, SHORT, SHORT, LONG, SHORT]
    found = list(batches(settings, [5, 1, 9, 5, 3, 7], 2))
    assert found == [([2, 5], SHORT), ([0, 3], SHORT), ([4, 1], LONG)]  # 0 before 3: of equal lengths the first
    assert list(batches([], [], 2)) == []


def stored(size: tuple[int, int], seed: int) -> dict[str, Any]:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    stream = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(stream, format="PNG")
    return {"bytes": stream.getvalue(), "path": None}


def documents() -> Dataset:
    """Questions on one image, on two, on a list of them, and on none."""
    rows = [{"question": "one?", "image": stored(SIZES[0], 0), "more": []}]
    rows += [{"question": "what is left of it?", "image": stored(SIZES[1], 1), "more": [stored(SIZES[2], 2)]}]
    rows += [{"question": "many many many?", "image": None, "more": [stored(size, 3) for size in SIZES[2:]]}]
    rows += [{"question": "none at all?", "image": None, "more": []}]
    kinds = {"question": Value("string"), "image": ImageColumn(), "more": List(ImageColumn())}
    return Dataset.from_list(rows, features=Features(kinds))


def requests(data: Any, count: int) -> list[Instance]:
    return [
        Instance(
            request_type="generate_until",
            arguments=(data[i]["question"], None, {}, i, "task", "test"),
            idx=0,
            metadata={"task": "task", "doc_id": i, "repeats": 1},
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_lengths_are_those_of_the_prompts(family: str, tmp_path: Path) -> None:
    """The same differences as between the real prompts; images tell theirs without being decoded."""
    model, data = Laavit(str(tiny(family, tmp_path))), documents()
    estimated = prompt_lengths(requests(data, 4), {"task": {"test": data}}, model.processor)
    real = []
    for row in data:
        images = [image for image in [row["image"], *row["more"]] if image is not None]
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": row["question"]}]
        real.append(model.encode([[{"role": "user", "content": content}]])["input_ids"].shape[1])
    assert all(own >= 3 for own in estimated)
    if family in EXACT:
        apart = [mine - theirs for mine, theirs in zip(real, estimated)]
        assert max(apart) - min(apart) <= 2 * AROUND  # rows 1 and 2 have two images


def test_documents_without_stored_images_count_their_words(export: Path) -> None:
    class Documents:
        def __getitem__(self, index: int) -> dict[str, str]:
            return {"question": ["how many ?", "what colour is it ?"][index]}

    model = Laavit(str(export))
    assert prompt_lengths(requests(Documents(), 2), {"task": {"test": Documents()}}, model.processor) == [3, 5]


def test_a_broken_image_is_left_to_who_decodes_it(export: Path) -> None:
    row = {"question": "how many ?", "image": {"bytes": b"no image", "path": None}}
    data = Dataset.from_list([row], features=Features({"question": Value("string"), "image": ImageColumn()}))
    undecoded = data.cast_column("image", ImageColumn(decode=False))
    assert prompt_lengths(requests(undecoded, 1), {"task": {"test": data}}, Laavit(str(export)).processor) == [3]
