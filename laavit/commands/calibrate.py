"""``laavit traces calibrate RECIPE``: which rows, layers and heads of the teacher look inside the boxes; what to set.

Half of the boxed samples choose, the other half reports: what is chosen as the best of many on some samples is too good
on them. Samples of one image stand on the same side.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from laavit.backbones.base import Backbone, collate
from laavit.backbones.rows import positions, row_positions
from laavit.commands.common import parse_recipe, recipe_parser
from laavit.files import write_json
from laavit.recipe import Recipe
from laavit.registry import UserError
from laavit.structures import Role, Sample
from laavit.teachers.extractor import HFExtractor
from laavit.teachers.settings import ExtractSettings
from laavit.traces.calibrate import BoxProbe, Cells, Choice, Interval, best, choose, interval, settings_of
from laavit.traces.grids import sample_mask

logger = logging.getLogger(__name__)

KINDS = ("question", "header", "answer", "predicting")


def boxed_samples(data: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """Samples with boxes, drawn at random without looking at more of the data than it takes.

    Raises:
        UserError: fewer than four samples have a box.
    """
    order = list(range(len(data)))
    random.Random(seed).shuffle(order)
    found: list[Sample] = []
    for place in order:
        sample = data[place]
        if sample.boxes and sample.images:
            found.append(sample)
        if len(found) == count:
            break
    if len(found) < 4:
        raise UserError(f"calibration needs samples with boxes, and {len(found)} of {len(order)} have one")
    return found


def halves(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Two halves in the given order, all samples of an image on one side.

    Raises:
        UserError: all samples are of one image.
    """
    by_image: dict[Any, list[Sample]] = {}
    for sample in samples:
        by_image.setdefault(sample.images, []).append(sample)
    if len(by_image) < 2:
        raise UserError("calibration needs samples of two images or more: one half chooses, the other reports")
    first: list[Sample] = []
    second: list[Sample] = []
    for group in by_image.values():
        (first if len(first) <= len(second) else second).extend(group)
    return first, second


@torch.no_grad()
def measure(
    extractor: HFExtractor, samples: Sequence[Sample], k: int, title: str, choices: Sequence[Choice] = ()
) -> tuple[Cells, torch.Tensor]:
    """Masses of every cell on every readable sample, and the in-box shares [C, 2, B] of the choices' maps."""
    backbone, size = extractor.backbone, extractor.settings.batch_size
    cells, shares = [], []
    for start in track(range(0, len(samples), size), title, console=Console(stderr=True), transient=True):
        prepared, kept = [], []
        for sample in samples[start : start + size]:
            try:
                prepared.append(extractor.preparer(sample))
                kept.append(sample)
            except UserError as error:  # as in an extraction: this sample is put aside, the others are measured
                logger.warning("%s", error)
        if not kept:
            continue
        probe = _probe(backbone, extractor, prepared, kept, k, choices)
        cells.append(probe.cells())
        shares.append(probe.shares())
    if not cells:
        raise UserError("none of the samples that calibration drew can be read")
    return Cells.joined(cells), torch.cat(shares, 2)


def _probe(
    backbone: Backbone,
    extractor: HFExtractor,
    prepared: Sequence[Any],
    samples: Sequence[Sample],
    k: int,
    choices: Sequence[Choice],
) -> BoxProbe:
    answered, _ = extractor.answered(prepared)
    batch = collate(answered, backbone.family, backbone.tokenizer.pad_token_id).to(backbone.device)
    image = positions(batch.roles == Role.IMAGE)
    inside = torch.zeros(image.shape)
    for row, (sample, item) in enumerate(zip(samples, answered, strict=True)):
        mask = sample_mask(sample.boxes, [span.tile for span in item.spans])
        inside[row, : len(mask)] = mask
    rows = {kind: row_positions(batch, kind) for kind in KINDS}
    probe = BoxProbe(rows, image, inside.to(image.device), k, choices)
    backbone.forward(batch, probe)
    return probe


def calibrate(recipe: Recipe, count: int, k: int) -> dict[str, Any]:
    """Measure, choose and report; plain JSON data.

    Raises:
        UserError: the recipe's teacher reads no words, or its data have too few boxes.
    """
    settings: ExtractSettings = recipe.build("extract")
    samples = boxed_samples(recipe.build("data"), count, recipe.config["seed"])
    first, second = halves(samples)
    teacher = recipe.build("teacher")
    extractor = teacher.extractor(settings)
    if not isinstance(extractor, HFExtractor):
        raise UserError(f"'{teacher.path}' has no rows of words to calibrate: a teacher that reads and answers has")
    config: Any = teacher.backbone.model.config
    depth, heads = teacher.backbone.depth, int(config.get_text_config().num_attention_heads)
    cells, _ = measure(extractor, first, k, "choosing")
    stages = choose(cells)
    proposal = best(stages, cells)
    pairs = settings.pairs(depth, heads)
    present = Choice("present", tuple(kind for kind in settings.rows if kind in KINDS), settings.depths(depth))
    if pairs is not None:
        flat = tuple((layer, head) for layer, own in pairs.items() for head in own)
        present = Choice("present", present.rows, None, flat)
    shown = [*([present] if present.rows == tuple(settings.rows) else []), *stages]
    reported, shares = measure(extractor, second, k, "reporting", shown)
    return {
        "teacher": teacher.path,
        "samples": {"chose": len(cells.chance), "reported": len(reported.chance)},
        "top_k": k,
        "chance": interval(reported.chance),
        "choices": [
            {
                "name": choice.name,
                "settings": settings_of(choice, depth),
                "in_box": interval(raw),
                "in_box_top_k": interval(top),
                "in_box_where_chosen": interval(cells.share(choice)),
            }
            for choice, (raw, top) in zip(shown, shares, strict=True)
        ],
        "proposal": {
            "name": proposal.name,
            "settings": settings_of(proposal, depth),
            "line": recipe_line(settings_of(proposal, depth), settings),
        },
        "cells": _table(Cells.joined([cells, reported])),
    }


def _table(cells: Cells) -> list[dict[str, Any]]:
    """Every kind of row, layer and head over all samples, which choose nothing here; ``head`` None: all of a layer."""
    found = []
    for t, kind in enumerate(cells.kinds):
        rows = cells.rows[:, t].clamp(min=1)
        for layer in range(cells.inside.shape[2]):
            for head in (None, *range(cells.inside.shape[3])):
                part = slice(None) if head is None else slice(head, head + 1)
                inside, total = (mass[:, t, layer, part].sum(1) for mass in (cells.inside, cells.total))
                entry = {
                    "rows": kind,
                    "layer": layer,
                    "head": head,
                    "in_box": interval(inside / total),
                    "mass": float((total / rows).mean()) / (cells.inside.shape[3] if head is None else 1),
                }
                if head is not None:
                    entry["in_box_top_k"] = interval(cells.top[:, t, layer, head])
                found.append(entry)
    return found


def recipe_line(proposed: Mapping[str, Any], settings: ExtractSettings) -> str:
    """A choice as a recipe's line: what is proposed, and what the recipe says besides."""
    arguments: dict[str, Any] = {"rows": proposed["rows"]}
    for field in fields(settings):
        present = getattr(settings, field.name)
        if field.name in ("layers", "heads"):
            if field.name in proposed or present is not None:  # a base may hold what the proposal has no use for
                arguments[field.name] = proposed.get(field.name)
        elif field.name != "rows" and present != field.default:
            arguments[field.name] = present
    return f"extract = dict({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def show(found: dict[str, Any], console: Console) -> None:
    """The report as tables."""

    def share(value: Interval) -> str:
        return "–" if math.isnan(value[0]) else f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"

    counts, k = found["samples"], found["top_k"]
    console.print(f"teacher {found['teacher']}: {counts['chose']} samples chose, {counts['reported']} others report")
    layers = Table("rows", "layer", "in-box share", "image's share", "best head", title="all samples, heads averaged")
    for cell in found["cells"]:
        if cell["head"] is None:
            own = [c for c in found["cells"] if (c["rows"], c["layer"]) == (cell["rows"], cell["layer"])]
            top = max(own[1:], key=lambda c: -1.0 if math.isnan(c["in_box"][0]) else c["in_box"][0])
            best_head = f"{top['head']}: {top['in_box'][0]:.3f}"
            layers.add_row(cell["rows"], str(cell["layer"]), share(cell["in_box"]), f"{cell['mass']:.3f}", best_head)
    console.print(layers)
    table = Table(
        "choice", "in-box share", f"after Top-{k}", "where it was chosen", title="on samples that chose nothing"
    )
    table.add_row("even gaze (chance)", share(found["chance"]), "", "")
    for choice in found["choices"]:
        figures = [share(choice[key]) for key in ("in_box", "in_box_top_k", "in_box_where_chosen")]
        table.add_row(f"{choice['name']}: {_words(choice['settings'])}", *figures)
    console.print(table)
    chosen = next(c for c in found["choices"] if c["name"] == found["proposal"]["name"])
    if not chosen["in_box"][1] > found["chance"][2]:
        console.print("The gaze is hardly localised: no choice of rows looks at the boxes clearly more than chance.")
    console.print(f"proposed ({found['proposal']['name']}), for the recipe:", markup=False)
    console.print("  " + found["proposal"]["line"], markup=False, highlight=False, soft_wrap=True)


def _words(settings: dict[str, Any]) -> str:
    kinds, layers, heads = "+".join(settings["rows"]), settings.get("layers"), settings.get("heads")
    if heads:
        return f"{kinds}, heads " + " ".join(f"{layer}:{head}" for layer, head in heads)
    return f"{kinds}, " + (f"layers {' '.join(map(str, layers))}" if layers else "all layers")


def calibrate_main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = recipe_parser(
        "laavit traces calibrate", "Measure which rows, layers and heads of the recipe's teacher look inside the boxes."
    )
    parser.add_argument("--samples", type=int, default=200, help="samples with boxes that are looked at")
    parser.add_argument("--top-k", type=int, default=8, help="of the sparsified map (paper: 8)")
    parser.add_argument("--out", type=Path, help="write every figure here, as JSON")
    options, recipe = parse_recipe(parser, argv)
    if recipe is None:
        return 0
    for name, least in (("samples", 4), ("top_k", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')}: at least {least}, got {getattr(options, name)}")
    found = calibrate(recipe, options.samples, options.top_k)
    if options.out is not None:
        write_json(options.out, _finite(found))
    console = Console()
    show(found, console if console.is_terminal else Console(width=140))
    return 0


def _finite(value: Any) -> Any:
    """JSON knows no NaN: a figure that no sample has is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


main = calibrate_main
