"""LaViT-15k's published features as a teacher: what its authors recorded is read from their files, not computed again.

Their training file names two files a sample: the last layer's states at the image tokens (a torch tensor [N, 5120])
and the trajectory, ``{"steps": [{"p_t", "p_topk_idx", "raw_attention_scores"}, ...]}``: S_j of Eq. 2 over all tokens
after the image, the last 8 layers, and ``p_t`` of Eq. 3 from it. Step t was recorded with the answer's steps 1..t
written out, so the last step's map is the aggregate over the whole answer.

What is not as it must be puts the sample aside with the reason: nothing is guessed, resampled or filled with zeros.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from laavit.images import image_size
from laavit.registry import TEACHERS, UserError
from laavit.structures import Sample, Step, Tile, Trace
from laavit.teachers.settings import ExtractSettings
from laavit.traces.semantics import select

#: what the authors' code did (``teacher_traj_extractor_attention.py``); the header of an imported store says so
RECORDED = {
    "rows": ("question", "header", "answer"),
    "layers": tuple(range(-8, 0)),
    "repetition_penalty": 1.05,
    "max_new_tokens": 4096,
}
#: how far a sum of attention may reach past 1: 16-bit rounding
OVER = 1.02


@TEACHERS.register_module()
class LaViT15kFeatures:
    """The features that LaViT's authors publish, read sample by sample.

    The samples have to carry the paths, ``meta["v_top_path"]`` and ``meta['attention_path']`` (the data set
    ``lavit_15k`` does). A path is looked for below ``root`` by its longest ending that is there, since the published
    ones are absolute on the authors' machine; nothing outside ``root`` is opened.

    Args:
        root: the folder of the features.
        path: the teacher that they were recorded from.
        width: of its states.
        min_pixels, max_pixels: the bounds between which the authors scaled images; the grid follows from them.
        patch: pixels of a vision patch. merge: patches a side that make one image token.
    """

    def __init__(
        self,
        root: str,
        path: str = "Qwen/Qwen2.5-VL-32B-Instruct",
        width: int = 5120,
        min_pixels: int = 200_704,
        max_pixels: int = 1_003_520,
        patch: int = 14,
        merge: int = 2,
    ) -> None:
        if not Path(root).is_dir():
            raise UserError(f"teacher.root: there is no folder '{root}'")
        if not 0 < min_pixels <= max_pixels:
            raise UserError(f"teacher.min_pixels {min_pixels} and teacher.max_pixels {max_pixels} are no range")
        self.root, self.path, self.width = Path(root), path, width
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.cell = patch * merge

    def card(self) -> dict[str, Any]:
        """What a store's header says: whose features, and how grids were recovered."""
        return {
            "teacher": self.path,
            "weights_sha256": None,
            "imported": "LaViT-15k, as its authors store it",
            "processor": {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels, "cell": self.cell},
            "width": self.width,
        }

    @classmethod
    def check_settings(cls, settings: ExtractSettings) -> None:
        """Raises: UserError: a setting asks for what was not recorded."""
        for name, recorded in RECORDED.items():
            if getattr(settings, name) != recorded:
                raise UserError(f"extract.{name}: the published features were recorded with {recorded}")
        fixed: dict[str, Any] = {"normalisation": "none", "blind": None, "tagger": None, "heads": None, "logits": 0}
        fixed["semantics_layer"] = -1
        for name, value in fixed.items():
            if getattr(settings, name) != value:
                raise UserError(f"extract.{name}: the published features allow {value!r} alone")

    def extractor(self, settings: ExtractSettings) -> OfficialExtractor:
        """Reads samples; settings that the recorded files cannot follow are refused.

        Raises:
            UserError: a setting asks for what was not recorded.
        """
        self.check_settings(settings)
        return OfficialExtractor(OfficialPreparer(self, settings))


class OfficialPreparer:
    """A sample's files -> its trace; without a model, so that data workers can run it."""

    def __init__(self, teacher: LaViT15kFeatures, settings: ExtractSettings) -> None:
        self.teacher, self.settings = teacher, settings

    def __call__(self, sample: Sample) -> Trace:
        """The sample's trace.

        Raises:
            UserError: a file is missing or does not read, or what is in it does not fit the image.
        """
        teacher, settings = self.teacher, self.settings
        if len(sample.images) != 1:
            raise UserError(f"features: one image a sample was recorded, this one has {len(sample.images)}")
        tile = grid(image_size(sample.images[0]), teacher.cell, teacher.min_pixels, teacher.max_pixels)
        maps = read_trajectory(find(sample, "attention_path", teacher.root))
        states = read_states(find(sample, "v_top_path", teacher.root), teacher.width)
        for what, count in (("map", len(maps[0])), ("features", len(states))):
            if count != tile.cells:
                raise UserError(
                    f"grid: {what} of {count} tokens, where the image and {teacher.min_pixels} to {teacher.max_pixels} "
                    f"pixels give {tile.height} x {tile.width} = {tile.cells}"
                )
        gaze = maps[-1]
        semantics, tokens = select(states, gaze, settings.semantics, settings.top_k)
        steps = [Step(f"step {place}", "", each) for place, each in enumerate(maps, 1)] if len(maps) > 1 else []
        answer = next(
            (sample.meta[key] for key in ("teacher_full_response", "final_answer") if sample.meta.get(key)), ""
        )
        return Trace(
            sample_id=sample.id,
            answer=str(answer),
            tiles=(tile,),
            gaze=gaze,
            semantics=semantics.clone(),  # a pooled or picked part must not keep the whole states alive
            mass=float(gaze.sum()),
            semantic_tokens=tokens,
            steps=tuple(steps),
        )


class OfficialExtractor:
    """Hands on what the preparer has read."""

    def __init__(self, preparer: OfficialPreparer) -> None:
        self.preparer = preparer

    def __call__(self, prepared: Sequence[Trace]) -> list[Trace]:
        return list(prepared)


def find(sample: Sample, key: str, root: Path) -> Path:
    """The file that a sample names, below ``root`` by its longest ending that is there.

    Raises:
        UserError: the sample names none, the name leads out of ``root``, or no ending of it is there.
    """
    name = sample.meta.get(key)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise UserError(f"features: the record has no '{key}'")
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", ".")]
    if ".." in parts:
        raise UserError(f"features: the path '{name}' leads upwards")
    real = root.resolve()
    for start in range(len(parts)):
        path = (real / Path(*parts[start:])).resolve()
        if path.is_file():
            if not path.is_relative_to(real):
                raise UserError(f"features: '{name}' leads out of '{root}'")
            return path
    raise UserError(f"features: there is no '{name}', nor an ending of it, in '{root}'")


def grid(size: tuple[int, int], cell: int, min_pixels: int, max_pixels: int) -> Tile:
    """Qwen2.5-VL's grid of image tokens for an image of (width, height) pixels.

    Raises:
        UserError: the image's sides differ by more than the processor takes.
    """
    width, height = size
    try:
        high, wide = smart_resize(height, width, cell, min_pixels, max_pixels)
    except ValueError as error:
        raise UserError(f"grid: the processor takes no image of {width} x {height} pixels: {error}") from error
    return Tile(high // cell, wide // cell)


def read_trajectory(path: Path) -> list[Tensor]:
    """The maps S_j of every step, float32 [N] each.

    Raises:
        UserError: the file is none of the authors' trajectories, or its maps are no attention.
    """
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
        if not isinstance(steps, list) or not steps:
            raise UserError(f"trajectory: '{path.name}' holds no steps")
        maps = []
        for step in steps:
            if "raw_attention_scores" not in step:
                raise UserError(
                    f"trajectory: '{path.name}' has no raw_attention_scores (method {step.get('method')!r}): "
                    "its p_t is no attention"
                )
            maps.append(torch.tensor(step["raw_attention_scores"], dtype=torch.float32))
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, RuntimeError) as error:
        raise UserError(f"trajectory: '{path.name}' does not read: {error}") from error
    for each in maps:
        if each.ndim != 1 or each.shape != maps[0].shape or not len(each):
            raise UserError(f"trajectory: the maps of '{path.name}' have the shapes {[tuple(m.shape) for m in maps]}")
        fine = bool(torch.isfinite(each).all()) and bool((each >= 0).all()) and 0 < float(each.sum()) <= OVER
        if not fine:
            raise UserError(
                f"trajectory: a map of '{path.name}' is no share of attention (it sums to {each.sum():.4g})"
            )
    return maps


def read_states(path: Path, width: int) -> Tensor:
    """The last layer's states at the image tokens: float32 [N, D].

    Raises:
        UserError: the file is no tensor of plain numbers, or of another shape.
    """
    try:
        states = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"features: '{path.name}' does not read as a tensor: {str(error).splitlines()[0]}") from error
    if isinstance(states, Tensor) and states.ndim == 3 and len(states) == 1:
        states = states[0]
    if not isinstance(states, Tensor) or not states.is_floating_point() or states.ndim != 2 or states.shape[1] != width:
        kind = (
            f"a tensor {tuple(states.shape)} of {states.dtype}" if isinstance(states, Tensor) else type(states).__name__
        )
        raise UserError(f"features: '{path.name}' holds {kind}; allowed: numbers [N, {width}]")
    states = states.to(torch.float32)
    if not bool(torch.isfinite(states).all()):
        raise UserError(f"features: '{path.name}' has entries that are not finite")
    return states
