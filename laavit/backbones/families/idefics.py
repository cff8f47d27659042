"""Idefics3 and SmolVLM: an image is cut into square tiles, and a global tile of the whole image follows them.

In the sequence each tile stands behind a marker, ``<row_r_col_c>`` or ``<global-img>``; pixel shuffle leaves the same
square of tokens for every tile. The processor stretches an image to whole tiles, so that tile (r, c) covers exactly its
share of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from laavit.backbones.families.base import Family
from laavit.registry import FAMILIES
from laavit.structures import Span, Tile

MARKER = re.compile(r"<row_(\d+)_col_(\d+)>$")
#: tokens before a tile in which its marker is looked for: SmolVLM's is one token, Idefics3's some eight, 14 at most
REACH = 24


@FAMILIES.register_module(name="idefics3")
class Idefics(Family):
    """One span a tile: the tiles of an image row by row, then its global tile; positions are counted by the model."""

    vision_keys = ("pixel_values", "pixel_attention_mask")
    takes_features = True

    def __init__(self, config: PreTrainedConfig, processor: Any) -> None:
        super().__init__(config, processor)
        self.merge = int(config.scale_factor)
        self.side = math.isqrt(processor.image_seq_len)  # tokens along a tile's side
        if self.side**2 != processor.image_seq_len:
            raise ValueError(f"a tile of {processor.image_seq_len} tokens is no square")

    def spans(self, input_ids: Tensor, vision: Mapping[str, Tensor]) -> tuple[Span, ...]:
        """Image tokens of one sequence [S] as one Span a tile.

        Raises:
            ValueError: the markers do not describe whole images, or their number of tiles is not that of the pixels.
        """
        spans: list[Span] = []
        for image, (starts, rows, columns) in enumerate(self._images(input_ids)):
            for number, start in enumerate(starts[:-1]):
                r, c = divmod(number, columns)
                region = (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows)
                spans.append(Span(start, Tile(self.side, self.side, image, region)))
            spans.append(Span(starts[-1], Tile(self.side, self.side, image)))
        if "pixel_values" in vision:
            tiles = int(_real(vision["pixel_values"]).sum())
            if tiles != len(spans):
                raise ValueError(f"{len(spans)} tiles in the sequence, {tiles} in the pixels")
        return tuple(spans)

    def _images(self, input_ids: Tensor) -> list[tuple[list[int], int, int]]:
        """Where the tiles of each image start (the global one last), and its rows and columns of tiles."""
        positions = (input_ids == self.image_token_id).nonzero().flatten().tolist()
        cells = self.side**2
        found: list[tuple[list[int], int, int]] = []
        starts: list[int] = []
        rows = columns = 0
        for start, stop in zip(positions[::cells], positions[cells - 1 :: cells], strict=False):
            before = self.processor.tokenizer.decode(input_ids[max(0, start - REACH) : start])
            marker = MARKER.search(before.rstrip())
            starts.append(start)
            if stop - start != cells - 1:
                raise ValueError(f"the {cells} image tokens from position {start} on are not contiguous")
            if marker is not None:
                rows, columns = int(marker[1]), int(marker[2])
                continue
            if len(starts) != rows * columns + 1:
                raise ValueError(f"an image of {rows} x {columns} tiles has {len(starts) - 1}")
            found.append((starts, rows, columns))
            starts, rows, columns = [], 0, 0
        if starts or len(positions) % cells:
            raise ValueError(f"{len(positions)} image tokens are no whole images of {cells} tokens a tile")
        return found

    def vision(self, output: Mapping[str, Any], images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Pixels as [images, tiles, 3, h, w]: a row an image, tiles of zeros where it has fewer, which the model skips.

        The processor gives [1, all tiles, ...]; with a row an image the model's features come back by image.
        """
        counts = [len(starts) for starts, _, _ in self._images(output["input_ids"][0])]
        pixels = output["pixel_values"][0]
        if sum(counts) != len(pixels):
            raise ValueError(f"{sum(counts)} tiles in the sequence, {len(pixels)} in the pixels")
        mask = output["pixel_attention_mask"][0].bool()
        pad = nn.utils.rnn.pad_sequence
        return {
            "pixel_values": pad(pixels.split(counts), batch_first=True),
            "pixel_attention_mask": pad(mask.split(counts), batch_first=True),
        }

    def batch(self, vision: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Vision tensors of several samples, [images, tiles, ...], padded to the most tiles."""
        most = max((tensor.shape[1] for item in vision for tensor in item.values()), default=0)

        def padded(tensor: Tensor) -> Tensor:
            missing = tensor.new_zeros(len(tensor), most - tensor.shape[1], *tensor.shape[2:])
            return torch.cat([tensor, missing], 1)

        return super().batch([{key: padded(tensor) for key, tensor in item.items()} for item in vision])

    def image_features(self, model: Any, vision: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What the language model reads in place of the image tokens: [N_i, D] an image."""
        return tuple(model.model.get_image_features(**vision).pooler_output)

    def feature_inputs(self, features: Sequence[Tensor]) -> dict[str, Any]:
        """Forward arguments that hand over cached features in place of pixels."""
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(features))}}

    def vision_tower(self, model: Any) -> nn.Module:
        return model.model.vision_model

    def decoder(self, model: Any) -> nn.Module:
        return model.model.text_model


def _real(pixels: Tensor) -> Tensor:
    """Which tiles of [images, tiles, 3, h, w] are no padding: bool [images, tiles]."""
    return (pixels != 0).flatten(2).any(2)


FAMILIES.register_module(name="smolvlm", module=Idefics)
