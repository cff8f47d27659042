"""Interventions as bars: answers that changed, what it cost, how far their distribution and the latents moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laavit.evaluation.statistics import holm
from laavit.reports.figures import LINE, SERIES, Figured, new_panel, shortened, to_svg
from laavit.reports.table import EMPTY, Cell, Table
from laavit.reports.tables import between, p_text, percent, points

#: measure -> (title, how many of it one unit of the axis is)
MEASURES = {
    "changed": ("answers that changed, %", 100.0),
    "delta": ("change of accuracy, points", 100.0),
    "kl": ("KL of the answer's distribution, nats", 1.0),
    "latent_shift": ("shift of the latents, 1 − cos", 1.0),
}


def effect_panels(content: Mapping[str, Any], number: int = 0) -> list[Figured]:
    """A panel for each measure that was taken: a bar for each intervention, a whisker for its 95 % interval.

    Args:
        content: an ``interventions.json``. number: tells the figures of one page apart.
    """
    effects = by_object(content)
    panels = []
    for measure, (title, scale) in MEASURES.items():
        known = [(name, one) for name, one in effects if one.get(measure) is not None]
        if not known:
            continue
        figure, axes = new_panel(height=0.62 + 0.26 * len(effects), left=0.42, right=0.95)
        for name, one in known:
            y = len(effects) - 1 - [each for each, _ in effects].index(name)
            mean, low, high = (scale * value for value in one[measure])
            colour = SERIES[2 if one["on"] == "latents" else 1]
            axes.barh(y, mean, height=0.62, color=colour, alpha=0.45, linewidth=0)
            axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round", clip_on=False)
        axes.axvline(0, color=LINE, linewidth=1.2)
        axes.set_yticks(range(len(effects)), [shortened(name.replace("_", " ")) for name, _ in reversed(effects)])
        axes.set_ylim(-0.6, len(effects) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        panels.append(Figured(title, to_svg(figure, f"effect-{number}-{measure}")))
    return panels


def by_object(content: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The effects, those on the latents first."""
    return sorted(content["effects"].items(), key=lambda item: item[1]["on"] != "latents")


def effects_table(content: Mapping[str, Any], source: str) -> Table:
    """The figures behind the bars, with adjusted p values, and how much alike the latents are."""
    effects = by_object(content)
    adjusted = holm([one["p"] if one.get("p") is not None else 1.0 for _, one in effects])
    body = []
    for (name, one), p in zip(effects, adjusted, strict=True):
        body.append(
            [
                Cell(name.replace("_", " "), source=source),
                Cell(one["on"], source=source),
                _figure(one.get("changed"), percent, source),
                _figure(one.get("delta"), points, source),
                Cell(EMPTY if one.get("p") is None else p_text(p).removeprefix("= "), source=source),
                _figure(one.get("kl"), _three, source),
                _figure(one.get("latent_shift"), _three, source),
                Cell(str(one["n"]), source=source),
            ]
        )
    reference = (content.get("reference") or {}).get("accuracy")
    notes = ["Changed, % and points, with 95 % intervals; p from McNemar's test, adjusted by Holm for the rows here."]
    if reference is not None:
        notes.append(
            f"Left alone the model answers {percent(reference[0])} % {between(reference[1], reference[2])} correctly."
        )
    notes += _collapse(content.get("collapse"))
    heads = ["intervention", "on", "changed", "accuracy", "p, Holm", "KL", "latents' shift", "n"]
    return Table("What each change does", heads, body, notes, 2)


def _collapse(found: Mapping[str, Any] | None) -> list[str]:
    """Whether the latents say different things, in a sentence."""
    if not found:
        return []
    cosine, rank = found.get("pairwise_cosine"), found.get("effective_rank")
    said = [f"The {found['latents']} latents of a question"] if found.get("latents") else ["The latents of a question"]
    if cosine:
        said.append(
            f"have a cosine of {cosine[0]:.3f} {between(cosine[1], cosine[2], _three)} to one another (1: all alike)"
        )
    if rank:
        said.append(
            f"{'and ' if cosine else 'have '}an effective rank of {rank[0]:.2f} {between(rank[1], rank[2], _two)} "
            "(1: all along one direction)"
        )
    return [" ".join(said) + "."]


def _figure(value: Sequence[float] | None, text: Any, source: str) -> Cell:
    if value is None:
        return Cell(EMPTY, source=f"{source}: not measured")
    mean, low, high = value
    return Cell(text(mean), between(low, high, text), source, value=mean, low=low, high=high)


def _two(value: float) -> str:
    return f"{value:.2f}"


def _three(value: float) -> str:
    return f"{value:.3f}"
