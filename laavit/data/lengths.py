"""How long the sequences of samples will be, without making them: from image sizes and texts.

An estimate serves to put samples of like length together and to keep a budget; no loss depends on it. Image tokens are
what the processor says of an image's size (read from the file's header), words are counted by the tokenizer, and what
the prompt writes around them is taken from the first sample, which alone is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from laavit.backbones.chat import SequenceBuilder, text_settings
from laavit.images import image_size
from laavit.structures import Sample

#: texts that the tokenizer is given at a time
CHUNK = 4096


def image_tokens(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """The positions that images of (height, width) pixels take in a sequence, each by itself."""
    # transformers' processors have it for servers, under this name; those without are asked with an empty image.
    known = getattr(processor, "_get_num_multimodal_tokens", None)
    if known is not None:
        return list(known(image_sizes=[list(size) for size in sizes])["num_image_tokens"])
    text = [processor.image_token]
    more = text_settings(processor.tokenizer, text)
    empty = (Image.new("RGB", (width, height)) for height, width in sizes)
    return [len(processor(text=text, images=[[image]], **more)["input_ids"][0]) for image in empty]


def words(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Tokens of texts, int64 [n]."""
    chunks = (list(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK))
    counts = [len(ids) for chunk in chunks for ids in tokenizer(chunk, add_special_tokens=False)["input_ids"]]
    return np.array(counts, dtype=np.int64)


def estimated(samples: Sequence[Sample], builder: SequenceBuilder, places: Sequence[int]) -> np.ndarray:
    """About how many tokens samples have: int64 [n, 2], up to the end of the last image, and after it.

    Where the question stands before the image, all of them count as after it: such samples share no beginning.

    Args:
        samples: the data set. builder: makes their sequences. places: the samples that are asked for.

    Raises:
        UserError: an image cannot be read, or the first sample not be encoded.
    """
    if not len(places):
        return np.zeros((0, 2), dtype=np.int64)
    bar = track([0, *places], "lengths", console=Console(stderr=True), transient=True)
    asked = [samples[place] for place in bar]
    paths = list(dict.fromkeys(path for sample in asked for path in sample.images))
    seen = track(paths, "image sizes", console=Console(stderr=True), transient=True)
    sizes = {path: image_size(path)[::-1] for path in seen}
    distinct = list(dict.fromkeys(sizes.values()))
    tokens = dict(zip(distinct, image_tokens(builder.processor, distinct), strict=True)) if distinct else {}
    before = np.array([sum(tokens[sizes[path]] for path in sample.images) for sample in asked], dtype=np.int64)
    after = words(builder.processor.tokenizer, [sample.question + builder.prompt.suffix for sample in asked])
    after += words(builder.processor.tokenizer, [sample.answer for sample in asked])
    after += np.array([builder.layout.count_of(sample.id) for sample in asked])
    first = builder.encode(asked[0], asked[0].answer)
    stop = max((span.end for span in first.spans), default=0)
    before += stop - before[0]
    after += len(first.input_ids) - stop - after[0]
    if builder.prompt.order == "question_first":
        before, after = np.zeros_like(before), before + after
    return np.maximum(np.stack([before, after], 1)[1:], 0)
