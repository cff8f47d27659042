"""Where models look: attention maps of chosen rows on samples with boxes, and their statistics (Table 2, Fig. 5).

For any Hugging Face folder, an export included: its own chat template's latents and system prompt are used, the gold
answer is given, and only the chosen rows are recorded.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.progress import track

from laavit.backbones.rows import check_kinds
from laavit.evaluation.bridge import read_export
from laavit.files import write_json, write_text
from laavit.images import open_image
from laavit.latents import LatentLayout, layout_of
from laavit.recipe import is_local, zoo_path
from laavit.registry import UserError
from laavit.structures import Sample, Trace
from laavit.teachers import ExtractSettings, HFTeacher
from laavit.traces.gaze import cv, entropy, salient_regions
from laavit.traces.grids import image_map, in_box_mass, sample_mask

logger = logging.getLogger(__name__)

#: the figures of a map (``measures``)
MEASURES = ("entropy", "entropy_share", "salient", "salient_share", "cv", "in_box")
NO_LOADING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Looker:
    """Whose gaze, and which of its attention rows.

    Args:
        name: how tables and figures call it. folder: a Hugging Face folder, hub name or ``zoo:NAME``.
        rows: kinds of rows that are averaged. layers: decoder layers, negative ones from the end; None is all.
    """

    name: str
    folder: str
    rows: tuple[str, ...] = ("header", "answer")
    layers: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> Looker:
        """``NAME=FOLDER``, ``NAME=FOLDER@latents`` or ``NAME=FOLDER@header+answer@-2,-1``.

        Raises:
            UserError: it reads otherwise.
        """
        name, equals, rest = text.partition("=")
        folder, *more = rest.split("@")
        if not equals or not name or not folder or len(more) > 2:
            raise UserError(
                f"'{text}' is no looker; write NAME=FOLDER, or NAME=FOLDER@header+answer@-2,-1 (rows, layers)"
            )
        try:
            layers = tuple(int(layer) for layer in more[1].split(",")) if len(more) > 1 and more[1] else None
        except ValueError:
            raise UserError(f"'{text}': layers are whole numbers, for example -2,-1") from None
        return cls(name, folder, tuple(more[0].split("+")) if more and more[0] else cls.rows, layers)


def settings_of(looker: Looker, **chosen: Any) -> ExtractSettings:
    """How a looker is read, as its export's card says: ``chosen`` are further settings of an extraction."""
    card = read_export(zoo_path(looker.folder))
    return ExtractSettings(
        rows=looker.rows,
        layers=looker.layers,
        semantics="mean",
        system=card.get("system", ""),
        prompt_order=card.get("order", "image_first"),
        **chosen,
    )


def check_looker(looker: Looker) -> LatentLayout:
    """The latents that the looker's prompts hold; costs no weights.

    Raises:
        UserError: its folder is none of a model, its rows are of latents, and it has none; or they are of no kind.
    """
    check_kinds(f"{looker.name}: rows", looker.rows)
    _check_folder(looker)
    # Where the number varies, as many as a prompt holds at inference; emitted ones stand before the answer.
    layout = replace(layout_of(read_export(zoo_path(looker.folder))), least=None)
    if "latents" in looker.rows and not layout.most:
        raise UserError(f"{looker.name}: '{looker.folder}' has no latents; its rows are header+answer")
    return layout


def _check_folder(looker: Looker) -> None:
    """Raises: UserError: a folder that is not there, or holds no model; a hub name is left to the hub."""
    folder = Path(zoo_path(looker.folder))
    if (folder / "config.json").is_file():
        return
    if (folder / "export").is_dir():
        raise UserError(f"{looker.name}: '{looker.folder}' is a run; give its export, '{looker.folder}/export'")
    if folder.is_dir():
        raise UserError(f"{looker.name}: '{looker.folder}' holds no model (config.json is missing)")
    if is_local(looker.folder):
        raise UserError(f"{looker.name}: there is no folder '{looker.folder}'")


def check_lookers(lookers: Sequence[Looker]) -> list[LatentLayout]:
    """``check_looker`` of each, before the first is loaded.

    Raises:
        UserError: as ``check_looker``, or two have one name.
    """
    names = [looker.name for looker in lookers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two lookers are called '{twice[0]}'; names are to differ")
    return [check_looker(looker) for looker in lookers]


def asked_by(looker: Looker, samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the words after the question that the looker was trained with, as its export's card says."""
    suffix = read_export(zoo_path(looker.folder)).get("suffix", "")
    return [replace(sample, question=sample.question + suffix) for sample in samples] if suffix else list(samples)


def look(
    looker: Looker,
    samples: Sequence[Sample],
    batch_size: int = 32,
    answer: str = "gold",
    max_new_tokens: int = 64,
    loading: Mapping[str, Any] = NO_LOADING,
) -> list[Trace]:
    """Traces of the looker's rows on every sample.

    Args:
        answer: the 'gold' answers are given, or the looker gives its 'own', greedily, of ``max_new_tokens`` at most.
        loading: further arguments of ``HFTeacher`` (dtype, device_map, max_pixels).

    Raises:
        UserError: the looker asks for latents and has none, or it cannot be loaded.
    """
    layout = check_looker(looker)
    settings = settings_of(
        looker,
        batch_size=batch_size,
        answer="teacher" if answer == "own" else "gold",
        max_new_tokens=max_new_tokens,
        passes=2 if layout.feedback else 1,  # what is fed back leaves no cache to go on from
    )
    extractor = HFTeacher(looker.folder, **loading).extractor(settings, layout)
    samples, found = asked_by(looker, samples), []
    for start in track(range(0, len(samples), batch_size), f"gaze of {looker.name}", transient=True):
        found += extractor([extractor.preparer(sample) for sample in samples[start : start + batch_size]])
    return found


def measures(traces: Sequence[Trace], samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Figures of every map, in the order of the samples: those of Table 2, and what does not depend on the tokens.

    ``entropy`` H in nats, ``salient`` regions and ``cv`` grow with the number N of image tokens; ``entropy_share`` is
    H / ln N and ``salient_share`` the salient regions over N, both in [0, 1]. ``in_box`` (S_focus) has an entry for
    each sample with boxes only.
    """
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for trace, sample in zip(traces, samples, strict=True):
        nats, count, size = float(entropy(trace.gaze)), float(salient_regions(trace.gaze)), len(trace.gaze)
        found["entropy"].append(nats)
        found["entropy_share"].append(nats / math.log(size) if size > 1 else 0.0)
        found["salient"].append(count)
        found["salient_share"].append(count / size)
        found["cv"].append(float(cv(trace.gaze)))
        if sample.boxes:
            mask = sample_mask(sample.boxes, trace.tiles, trace.gaze.dtype)
            found["in_box"].append(float(in_box_mass(trace.gaze, mask)))
    return found


def statistics(traces: Sequence[Trace], samples: Sequence[Sample]) -> dict[str, Any]:
    """Entropy, salient regions and CV (mean, standard deviation over samples); in-box share (mean, 95 % interval).

    The interval of the mean is normal: mean +- 1.96 standard errors over samples.
    """
    found = measures(traces, samples)
    result: dict[str, Any] = {"n": len(traces)}
    for name in ("entropy", "salient", "cv", "in_box"):
        values = found[name]
        if not values:
            continue
        tensor = torch.tensor(values, dtype=torch.float64)
        mean, spread = float(tensor.mean()), float(tensor.std()) if len(values) > 1 else 0.0
        half = 1.96 * spread / math.sqrt(len(values))
        result[name] = [mean, mean - half, mean + half] if name == "in_box" else [mean, spread]
    return result


def write_gaze(
    out: Path, lookers: Sequence[Looker], samples: Sequence[Sample], show: int = 6, batch_size: int = 32
) -> dict[str, Any]:
    """Write ``out/index.json`` with pictures of the first samples of each source, and ``out/statistics.json`` over all.

    Args:
        lookers: whose gaze. samples: what is looked at. show: how many samples are drawn, spread over their sources.
    """
    if not samples:
        raise UserError("there is no sample to look at")
    check_lookers(lookers)
    out.mkdir(parents=True, exist_ok=True)
    traces = {looker.name: look(looker, samples, batch_size) for looker in lookers}
    figures = {name: statistics(found, samples) for name, found in traces.items()}
    index = []
    for place in spread(samples, show):
        sample = samples[place]
        picture = f"{place:06d}{Path(sample.images[0]).suffix}"
        shutil.copyfile(sample.images[0], out / picture)
        open_image(out / picture).close()
        index.append(
            {
                "id": sample.id,
                "image": picture,
                "question": sample.question,
                "answer": sample.answer,
                "boxes": [[box.x1, box.y1, box.x2, box.y2] for box in sample.boxes if box.image == 0],
                "maps": {name: map_of(found[place]) for name, found in traces.items()},
            }
        )
    write_text(out / "index.json", json.dumps(index, ensure_ascii=False) + "\n")
    write_json(out / "statistics.json", figures)
    logger.info("gaze of %s on %d samples -> %s", ", ".join(figures), len(samples), out)
    return figures


def spread(samples: Sequence[Sample], show: int) -> list[int]:
    """Places of ``show`` samples taken in turn from every source, on different images."""
    by_source: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        by_source.setdefault(sample.source, []).append(place)
    chosen: list[int] = []
    images: set[Any] = set()
    for turn in range(max(map(len, by_source.values()))):
        for places in by_source.values():
            fresh = [p for p in places[turn:] if samples[p].images not in images]
            if fresh and len(chosen) < show:
                chosen.append(fresh[0])
                images.add(samples[fresh[0]].images)
        if len(chosen) >= show:
            break
    return chosen


def map_of(trace: Trace, image: int = 0) -> Mapping[str, Any]:
    """The map of one image as one grid over all of it, whatever tiles the model saw it in."""
    found = image_map(trace.gaze, trace.tiles, image)
    return {"grid": list(found.shape), "values": [round(float(x), 6) for x in found.flatten()]}
