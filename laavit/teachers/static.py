"""Static image encoders as teachers: the control target of LaViT's semantics (App. C.1) and gaze (Sec. 4.1).

An encoder without words: its semantics cannot depend on the question, its gaze is where the CLS token looks. A student
that gains as much from it gains from something else than the teacher's understanding.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, cuda, nn

from laavit.backbones.base import digest_of, dtype_of
from laavit.backbones.encoders import local_weights
from laavit.registry import UserError
from laavit.structures import Tile, Trace
from laavit.teachers.base import SampleError
from laavit.teachers.pictures import PicturePreparer, Pictures
from laavit.teachers.probe import RowProbe
from laavit.teachers.settings import ExtractSettings
from laavit.traces.gaze import normalise, to_distribution
from laavit.traces.semantics import select

logger = logging.getLogger(__name__)

#: settings of a teacher that reads and answers; a static encoder has no use for them
WORDS = ("rows", "answer", "passes", "prompt_order", "system", "max_new_tokens", "repetition_penalty")


class Tower(ABC):
    """A vision transformer as the extraction looks at it; frozen and in eval mode.

    Args:
        model: the transformer. attentions: the attention module of each layer. pool: the attention pool whose one
            query stands for the CLS token where a model has none. patch: pixels of a patch, height and width.
        width: of its states.
    """

    def __init__(
        self,
        model: nn.Module,
        attentions: Sequence[nn.Module],
        pool: nn.Module | None,
        patch: tuple[int, int],
        width: int,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.attentions, self.pool = tuple(attentions), pool
        self.patch, self.width = patch, width
        switched: Any
        for switched in (*self.attentions, pool):
            if hasattr(switched, "fused_attn"):
                switched.fused_attn = True  # timm's switch between maps of its own and torch's function

    @abstractmethod
    def states(self, pixels: Tensor, layer: int) -> Tensor:
        """The patches' states after a layer (the last one's normalised), the pool run too: [B, 3, ...] -> [B, N, D]."""


def check_weights(weights: str | None, pretrained: Any) -> str | None:
    """The local file of weights, or None where they come from the hub.

    Raises:
        UserError: neither is asked for (random weights are no teacher), or the file is not there or of another format.
    """
    if weights is None:
        if not pretrained:
            raise UserError(
                "teacher.weights: give a .safetensors file, or teacher.pretrained to read them from the hub; "
                "a static encoder with random weights is no teacher"
            )
        return None
    return local_weights(weights, "teacher.weights")


class StaticEncoder:
    """A frozen vision transformer as a teacher.

    Args:
        path: the model's name in its package. package: 'timm' or 'open_clip'. tower: the model.
        preparer: how it reads images.
        dtype: of the weights. device: 'auto' takes a GPU where there is one.
    """

    #: it sees no words: a store's header says so, too
    static = True

    def __init__(
        self, path: str, package: str, tower: Tower, preparer: PicturePreparer, dtype: str, device: str
    ) -> None:
        self.path, self.package, self.tower, self.preparer = path, package, tower, preparer
        self.device = torch.device(("cuda" if cuda.is_available() else "cpu") if device == "auto" else device)
        self.dtype = dtype_of(dtype)
        tower.model.to(self.device, self.dtype)

    @classmethod
    def check_settings(cls, settings: ExtractSettings) -> None:
        """Raises: UserError: the settings ask for what needs words."""
        if settings.steps != "none":
            raise UserError(f"extract.steps: '{settings.steps}' needs an answer, and a static encoder gives none")
        if settings.blind is not None:
            raise UserError("extract.blind: a static encoder answers no question, with or without the image")
        if settings.logits:
            raise UserError("extract.logits: a static encoder predicts no words, and has no logits along an answer")

    def card(self) -> dict[str, Any]:
        """What a store's header says; ``static`` is the query whose attention the gaze is."""
        return {
            "teacher": self.path,
            "library": self.package,
            "weights_sha256": digest_of(self.tower.model),
            "processor": type(self.preparer).__name__,
            "image_processor": json.dumps(self.preparer.card()),
            "chat_template": None,
            "width": self.tower.width,
            "depth": len(self.tower.attentions),
            "static": "pool" if self.tower.pool is not None else "cls",
        }

    def extractor(self, settings: ExtractSettings) -> StaticExtractor:
        return StaticExtractor(self, settings)


class StaticExtractor:
    """Gaze and patch embeddings of a batch of pictures.

    The gaze is the CLS token's attention to the patches, averaged over the heads that the settings name (all) and over
    the layers that they name (the last one, where ``layers`` names none: a CLS token's early rows say little). A model
    without a CLS token has the row of its attention pool's one query in its place. With several images, T of Eq. 2 are
    their CLS tokens: each looks at its own image alone. The semantics are the patches' states.

    A static encoder does not answer: a trace carries the gold answer, and the correctness filter says nothing of it.
    ``rows``, ``answer``, ``passes``, ``prompt_order``, ``system``, ``max_new_tokens`` and ``repetition_penalty`` do not
    apply.

    Raises:
        UserError: the settings ask for what needs words (steps, a blind answer, answer logits), or for a layer or a
            head that is not there.
    """

    def __init__(self, teacher: StaticEncoder, settings: ExtractSettings) -> None:
        self.teacher, self.settings, self.preparer = teacher, settings, teacher.preparer
        teacher.check_settings(settings)
        unread = [name for name in WORDS if getattr(settings, name) != getattr(ExtractSettings(), name)]
        if unread:
            logger.info("a static encoder reads no words: extract.%s do not apply", ", ".join(unread))
        tower = teacher.tower
        self.modules, self.heads = self._wanted()
        depth = len(tower.attentions)
        if not -depth <= settings.semantics_layer < depth:
            raise UserError(
                f"extract.semantics_layer: got {settings.semantics_layer}, and the encoder has {depth} layers"
            )
        self.layer = settings.semantics_layer % depth

    def _wanted(self) -> tuple[dict[int, nn.Module], dict[int, tuple[int, ...]] | None]:
        """The attention modules to read, by layer, and their heads (None: all)."""
        settings, tower = self.settings, self.teacher.tower
        modules = (tower.pool,) if tower.pool is not None else tower.attentions
        if tower.pool is not None and settings.layers is not None:
            raise UserError(
                f"extract.layers: {self.teacher.path} has no CLS token; its gaze is the row of its attention pool, "
                "which is one layer: leave extract.layers out"
            )
        if settings.layers is None and not any(isinstance(head, tuple) for head in settings.heads or ()):
            settings = replace(settings, layers=(-1,))
        heads = settings.pairs(len(modules), int(modules[0].num_heads))  # type: ignore[arg-type]
        layers = settings.depths(len(modules)) if heads is None else tuple(heads)
        return {layer: modules[layer] for layer in layers}, heads

    @torch.no_grad()
    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """One batch of equal sizes [B, 3, ...]: the patches' share of each gaze row [B, N], their states [B, N, D]."""
        probe = RowProbe(self.modules)
        with probe:
            states = self.teacher.tower.states(pixels.to(self.teacher.device, self.teacher.dtype), self.layer)
        tokens = states.shape[1]
        rows = []
        for layer in self.modules:
            row = probe.rows[layer][..., -tokens:]  # CLS and registers stand before the patches
            rows.append(row.unbind(1) if self.heads is None else [row[:, head] for head in self.heads[layer]])
        mean = torch.stack([head for layer in rows for head in layer]).mean(0)
        return mean.cpu(), states.to(torch.promote_types(states.dtype, torch.float32)).cpu()

    def __call__(self, prepared: Sequence[Pictures]) -> list[Trace]:
        """The traces of one batch; images of one size go through the encoder together."""
        pixels = [picture for item in prepared for picture in item.pixels]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, picture in enumerate(pixels):
            groups.setdefault(tuple(picture.shape), []).append(index)
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        for indices in groups.values():
            rows, states = self.look(torch.stack([pixels[i] for i in indices]))
            seen |= {index: (rows[i], states[i]) for i, index in enumerate(indices)}
        traces, start = [], 0
        for item in prepared:
            traces.append(self._trace(item, [seen[start + i] for i in range(len(item.pixels))]))
            start += len(item.pixels)
        return traces

    def _trace(self, item: Pictures, seen: Sequence[tuple[Tensor, Tensor]]) -> Trace:
        """One sample's images as one trace."""
        patch = self.teacher.tower.patch
        tiles = tuple(
            Tile(picture.shape[1] // patch[0], picture.shape[2] // patch[1], image)
            for image, picture in enumerate(item.pixels)
        )
        rows = [row for row, _ in seen]
        mass = float(torch.cat(rows).sum()) / len(rows)
        if self.settings.normalisation == "rows":
            rows = [row / row.sum() for row in rows]
        gaze = torch.cat(rows) / len(rows)  # S_j of Eq. 2: a CLS token's row is zero on the other images
        states = torch.cat([states for _, states in seen])
        if not bool(torch.isfinite(gaze).all() and torch.isfinite(states).all()):
            raise SampleError(
                item.sample.id,
                f"the trace of sample '{item.sample.id}' is not finite: the encoder's weights are damaged, "
                f"or its numbers overflow in {self.teacher.dtype} (teacher.dtype)",
            )
        semantics, tokens = select(states, gaze, self.settings.semantics, self.settings.top_k)
        return Trace(
            sample_id=item.sample.id,
            answer=item.sample.answer,
            tiles=tiles,
            gaze=self._scaled(gaze),
            semantics=semantics,
            mass=mass,
            semantic_tokens=tokens,
        )

    def _scaled(self, gaze: Tensor) -> Tensor:
        """The map as it is stored."""
        if self.settings.normalisation == "minmax":
            return normalise(gaze)
        return to_distribution(gaze) if self.settings.normalisation == "distribution" else gaze
