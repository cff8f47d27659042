"""Which questions are answered together: those of equal settings, the longest first, so that little is padded."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import PIL.Image
from datasets import Dataset, Image, List
from lmms_eval.api.instance import Instance

from laavit.evaluation.generation import Settings

#: pixels of an image token, where the processor does not tell: Qwen2.5-VL's merged patch of 28 x 28
PIXELS_A_TOKEN = 784


def batches(
    settings: Sequence[Settings], lengths: Sequence[int], batch_size: int
) -> Iterator[tuple[list[int], Settings]]:
    """Indices of the requests that stand in one batch, and their settings.

    The order depends on settings and lengths alone and is stable, so that a run that is started again makes the same
    batches; the longest come first, so that what does not fit into the memory shows at once.

    Args:
        settings: of each request. lengths: of their prompts.
    """
    groups: dict[Settings, list[int]] = {}
    for index, one in enumerate(settings):
        groups.setdefault(one, []).append(index)
    for one, indices in groups.items():
        indices.sort(key=lambda i: -lengths[i])
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size], one


def prompt_lengths(
    requests: Sequence[Instance], documents: Mapping[str, Mapping[str, Any]], processor: Any
) -> list[int]:
    """How many tokens each request's question and images are, without decoding an image.

    Sizes are read from the headers of the stored images. The tokens that all prompts share are left out, and of an
    image that the task scales itself the stored size counts: the order of the lengths is what matters.

    Args:
        documents: task -> split -> its documents (lmms-eval's ``task_dict``).
    """
    texts = [str(request.args[0]) for request in requests]
    lengths = [len(ids) for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    headers: dict[tuple[str, str], Dataset | None] = {}

    @cache
    def tokens(width: int, height: int) -> int:
        return _image_tokens(processor, width, height)

    for number, request in enumerate(requests):
        _, _, _, index, task, split = request.args
        if (task, split) not in headers:
            headers[task, split] = _undecoded(documents[task][split])
        stored = headers[task, split]
        if stored is not None:
            lengths[number] += sum(tokens(*size) for size in _sizes(stored[index].to_pylist()[0]))
    return lengths


def _undecoded(documents: Any) -> Dataset | None:
    """The columns that hold images, as stored; None where there are none."""
    if not isinstance(documents, Dataset):
        return None
    columns = [
        name
        for name, kind in documents.features.items()
        if isinstance(kind, Image) or (isinstance(kind, List) and isinstance(kind.feature, Image))
    ]
    return documents.select_columns(columns).with_format("arrow") if columns else None


def _sizes(row: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Width and height of every image of a stored row; what cannot be read is left to whoever decodes it."""
    for value in row.values():
        for one in value if isinstance(value, list) else [value]:
            if one is None:
                continue
            try:
                with PIL.Image.open(io.BytesIO(one["bytes"]) if one["bytes"] else one["path"]) as image:
                    yield image.size
            except OSError:
                continue


def _image_tokens(processor: Any, width: int, height: int) -> int:
    """By the processor's own account where it gives one."""
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None:
        return width * height // PIXELS_A_TOKEN
    return int(count(image_sizes=[(height, width)])["num_image_tokens"][0])
