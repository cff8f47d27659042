"""What the page's sections share, and those on interventions and analyses."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from laavit.reports.bars import effect_panels, effects_table
from laavit.reports.guide import OPENINGS
from laavit.reports.rows import Row
from laavit.reports.runs import Run

#: what a picture file is to a browser
_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}


def absent(sentence: str) -> str:
    """What a run does not hold, said in its place."""
    return f"<p class='absent'>{html.escape(sentence)}</p>"


def section(name: str, title: str, *parts: str) -> str:
    """A section of the page; it opens with what it shows and what not to conclude from it (``OPENINGS``)."""
    opening = ""
    if name in OPENINGS:
        shown, caution = OPENINGS[name]
        opening = f"<p>{html.escape(shown)}</p><p class='caution'>{html.escape(caution)}</p>"
    return f"<section id='{name}'><h2>{html.escape(title)}</h2>{opening}{''.join(parts)}</section>"


def listed(names: Iterable[str]) -> str:
    """'a, b and c'."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def interventions(rows: Sequence[Row]) -> str:
    """What changing the latents or the image does to the answers: bars and their figures, model by model."""
    changed = [(row, one) for row in rows for one in row.evaluations if one.effects.get("effects")]
    if not changed:
        sentence = "No run holds an interventions.json, so it is not shown what changing the latents or the image does."
        return section("interventions", "What the answer depends on", absent(sentence))
    parts = []
    for number, (row, one) in enumerate(changed):
        name = row.label + (f", run {one.source.partition('/')[0]}" if len(row.evaluations) > 1 else "")
        parts.append(f"<h3>{html.escape(name)}</h3>")
        panels = effect_panels(one.effects, number)
        drawn = "".join(f"<figure><figcaption>{html.escape(p.title)}</figcaption>{p.svg}</figure>" for p in panels)
        parts.append(f"<div class='panels'>{drawn}</div>")
        parts.append(effects_table(one.effects, f"{one.source.rpartition('/')[0]}/interventions.json").to_html())
        skipped = one.effects.get("skipped") or {}
        parts += [absent(f"{name}: {reason}.") for name, reason in skipped.items()]
    return section("interventions", "What the answer depends on", *parts)


def analyses(runs: Sequence[Run]) -> str:
    """The pictures of the analyses that were run."""
    shown = [(run, one) for run in runs for one in run.analyses if one.picture is not None]
    if not shown:
        return ""
    parts = []
    for run, one in shown:
        caption = f"{one.name}, {run.label}. Figures: {run.path.name}/analysis/{one.name}.json"
        alt = html.escape(caption, quote=True)
        parts.append(
            f"<figure class='analysis'><div class='scroll' tabindex='0'>"
            f"<img src='{_data(one.picture)}' alt='{alt}'></div>"
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    return section("analyses", "Analyses", *parts)


def _data(picture: Path | None) -> str:
    if picture is None:
        raise ValueError("only analyses with a picture are shown")
    return f"data:{_TYPES[picture.suffix]};base64,{base64.b64encode(picture.read_bytes()).decode('ascii')}"
