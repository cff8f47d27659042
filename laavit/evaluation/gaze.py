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
from typing import Any

import torch
from rich.progress import track

from laavit.evaluation.bridge import read_export
from laavit.files import write_json, write_text
from laavit.images import open_image
from laavit.latents import layout_of
from laavit.recipe import zoo_path
from laavit.registry import UserError
from laavit.structures import Sample, Trace
from laavit.teachers import ExtractSettings, HFTeacher
from laavit.traces.gaze import cv, entropy, salient_regions
from laavit.traces.grids import image_map, in_box_mass, sample_mask

logger = logging.getLogger(__name__)


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


def look(looker: Looker, samples: Sequence[Sample], batch_size: int = 32) -> list[Trace]:
    """Traces of the looker's rows on every sample, the gold answers given."""
    card = read_export(zoo_path(looker.folder))
    settings = ExtractSettings(
        rows=looker.rows,
        layers=looker.layers,
        answer="gold",
        semantics="mean",
        system=card.get("system", ""),
        prompt_order=card.get("order", "image_first"),
        batch_size=batch_size,
    )
    # Where the number varies, as many as a prompt holds at inference; emitted ones stand before the gold answer.
    layout = replace(layout_of(card), least=None)
    if "latents" in looker.rows and not layout.most:
        raise UserError(f"{looker.name}: '{looker.folder}' has no latents; its rows are header+answer")
    extractor = HFTeacher(looker.folder).extractor(settings, layout)
    starts = range(0, len(samples), batch_size)
    found = []
    for start in track(starts, f"gaze of {looker.name}", transient=True):
        found += extractor([extractor.preparer(sample) for sample in samples[start : start + batch_size]])
    return found


def statistics(traces: Sequence[Trace], samples: Sequence[Sample]) -> dict[str, Any]:
    """Entropy, salient regions and CV (mean, standard deviation over samples); in-box share (mean, 95 % interval).

    The interval of the mean is normal: mean +- 1.96 standard errors over samples.
    """
    measures: dict[str, list[float]] = {"entropy": [], "salient": [], "cv": [], "in_box": []}
    for trace, sample in zip(traces, samples, strict=True):
        measures["entropy"].append(float(entropy(trace.gaze)))
        measures["salient"].append(float(salient_regions(trace.gaze)))
        measures["cv"].append(float(cv(trace.gaze)))
        if sample.boxes:
            measures["in_box"].append(float(in_box_mass(trace.gaze, sample_mask(sample.boxes, trace.tiles))))
    result: dict[str, Any] = {"n": len(traces)}
    for name, values in measures.items():
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
    out.mkdir(parents=True, exist_ok=True)
    traces = {looker.name: look(looker, samples, batch_size) for looker in lookers}
    figures = {name: statistics(found, samples) for name, found in traces.items()}
    index = []
    for place in _spread(samples, show):
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
                "maps": {name: _map(found[place]) for name, found in traces.items()},
            }
        )
    write_text(out / "index.json", json.dumps(index, ensure_ascii=False) + "\n")
    write_json(out / "statistics.json", figures)
    logger.info("gaze of %s on %d samples -> %s", ", ".join(figures), len(samples), out)
    return figures


def _spread(samples: Sequence[Sample], show: int) -> list[int]:
    """Places of samples taken in turn from every source, on different images."""
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


def _map(trace: Trace) -> Mapping[str, Any]:
    """The map of the first image as one grid over all of it, whatever tiles the model saw it in."""
    found = image_map(trace.gaze, trace.tiles, image=0)
    return {"grid": list(found.shape), "values": [round(float(x), 6) for x in found.flatten()]}
