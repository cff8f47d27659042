"""The report: one self-contained HTML page, and the same tables as Markdown.

The page loads nothing: style, figures and images are inside it. It follows the reader's light or dark setting and
folds to the width of a phone. Where a run does not hold what a section needs, a sentence says so in its place.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from laavit import __version__
from laavit.evaluation.statistics import wilson
from laavit.files import write_text
from laavit.reports.figures import Figured, accuracy_panels, colours, curve_panels, gaze_figures
from laavit.reports.guide import GUIDE
from laavit.reports.runs import GazeSample, Run, load_runs
from laavit.reports.tables import (
    EMPTY,
    Cell,
    Comparison,
    Row,
    Table,
    comparisons,
    comparisons_table,
    flatten,
    gaze_table,
    p_text,
    percent,
    recipe_table,
    result_rows,
    results_table,
)

#: Bootstrap draws behind every paired interval.
ITERATIONS = 10_000
TITLE = "Where the student looks, and what it answers"


def build_page(
    runs: Sequence[Path],
    out: Path,
    *,
    title: str = TITLE,
    labels: Sequence[str] | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Write one HTML page about several run folders.

    Args:
        runs: run folders in the order of the rows; a baseline comes before what is compared with it.
        out: the page. title: its heading.
        labels: what the rows are called (by default the folders' names).
        notes: sentences that the reader has to know, shown on top and in the guide.
        seed: of the bootstrap.

    Returns: ``out``.

    Raises:
        UserError: a folder is missing or damaged, two runs share a label, or no run was evaluated.
    """
    loaded = load_runs(runs, labels)
    rows = result_rows(loaded)
    found = comparisons(rows, ITERATIONS, seed)
    colour = colours([run.label for run in loaded])
    body = "\n".join(
        [
            _header(title, loaded, rows, found, notes),
            _results(loaded, rows, found, colour),
            _gaze(loaded),
            _curves(loaded, colour),
            _compared(loaded),
            _guide(notes),
            _provenance(loaded, seed),
        ]
    )
    style = files("laavit.reports").joinpath("page.css").read_text(encoding="utf-8")
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><link rel='icon' href='data:,'><style>{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
    out = Path(out)
    write_text(out, page)
    return out


def write_table(
    runs: Sequence[Path],
    out_md: Path,
    *,
    title: str = TITLE,
    labels: Sequence[str] | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Write the tables of ``build_page`` as Markdown: same arguments, same figures, same errors.

    Returns: ``out_md``.
    """
    loaded = load_runs(runs, labels)
    rows = result_rows(loaded)
    found = comparisons(rows, ITERATIONS, seed)
    tables = [results_table(rows), comparisons_table(found, ITERATIONS)] if found else [results_table(rows)]
    tables += [_statistics_table(run, alone=_gaze_runs(loaded) == 1) for run in loaded if run.statistics]
    finding = [f"- {_plain(one)}" for one in _headline(rows, found)]
    parts = [f"## {title}\n", "\n".join([*finding, *(f"- {note}" for note in notes)]) + "\n"]
    parts += [table.to_markdown() for table in tables]
    parts.append("Records: " + "; ".join(f"{row.label}: `{row.evaluation.source}`" for row in rows) + ".\n")
    out_md = Path(out_md)
    write_text(out_md, "\n".join(parts))
    return out_md


def _absent(sentence: str) -> str:
    return f"<p class='absent'>{html.escape(sentence)}</p>"


def _section(name: str, title: str, *parts: str) -> str:
    return f"<section id='{name}'><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def _and(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _headline(rows: Sequence[Row], found: Sequence[Comparison]) -> list[Comparison]:
    """What the reader came for: the last model with latents against the others, and with its latents masked."""
    on = [row for row in rows if row.evaluation.latents != "off"]
    if not on:
        return []
    best = [one for one in found if one.row is on[-1] and one.reference.evaluation.latents != "off"][::-1]
    masked = [one for one in found if one.reference is on[-1] and one.row.evaluation.latents == "off"]
    return best + masked


def _plain(one: Comparison) -> str:
    """A comparison as a sentence; nothing in it is typed in by hand."""
    ours, theirs = wilson(*one.row.share()), wilson(*one.reference.share())
    apart = ours[0] > theirs[1] or theirs[0] > ours[1]
    own = f"their own 95 % intervals {'do not overlap' if apart else 'overlap'}"
    (k, n), (other, m) = one.row.share(), one.reference.share()
    return (
        f"{one.row.label} answers {percent(k / n)} % of {n} questions, {one.reference.label} {percent(other / m)} %"
        f"{'' if n == m else f' of {m}'}: {100 * one.gain.mean:+.1f} points [{100 * one.gain.low:+.1f}, "
        f"{100 * one.gain.high:+.1f}] on the {one.gain.n} they share, McNemar's p {p_text(one.p)}; {own}."
    )


def _header(
    title: str, runs: Sequence[Run], rows: Sequence[Row], found: Sequence[Comparison], notes: Sequence[str]
) -> str:
    questions = len({record.key for row in rows for record in row.evaluation.records})
    lead = (
        f"{_and(run.label for run in runs)} on {questions} questions. Every figure below is computed from per-sample "
        "records; how to read them stands at the end."
    )
    sentences = [f"<p>{html.escape(_plain(one))}</p>" for one in _headline(rows, found)]
    finding = f"<div class='finding'>{''.join(sentences)}</div>" if sentences else ""
    said = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in notes)
    return f"<header><h1>{html.escape(title)}</h1><p class='lead'>{html.escape(lead)}</p>{finding}{said}</header>"


def _compared(runs: Sequence[Run]) -> str:
    parts = []
    table = recipe_table(runs)
    without = [run.label for run in runs if not run.recipe]
    if table is not None:
        parts.append(table.to_html().replace("<table>", "<table class='text'>"))
    else:
        parts.append(_absent("There are no two runs whose recipes differ, so there is nothing to set side by side."))
    if without:
        parts.append(
            _absent(f"{_and(without)}: no recipe.json in the folder, so it was evaluated but not trained here.")
        )
    return _section("compared", "What was compared", *parts)


def _legend(colour: dict[str, str], labels: Iterable[str]) -> str:
    order = list(colour)
    items = "".join(
        f"<li><i style='background:var(--c{order.index(label) % 8})'></i>{html.escape(label)}</li>" for label in labels
    )
    return f"<ul class='legend'>{items}</ul>"


def _panels(panels: Sequence[Figured]) -> str:
    drawn = "".join(
        f"<figure><figcaption>{html.escape(panel.title)}</figcaption>{panel.svg}</figure>" for panel in panels
    )
    return f"<div class='panels'>{drawn}</div>"


def _results(runs: Sequence[Run], rows: Sequence[Row], found: Sequence[Comparison], colour: dict[str, str]) -> str:
    parts = [
        "<p>Share of questions answered correctly. A bar is a 95 % interval; a hollow dot has its latents masked.</p>"
    ]
    parts += [_panels(accuracy_panels(rows, colour)), results_table(rows).to_html()]
    if found:
        parts.append(comparisons_table(found, ITERATIONS).to_html())
    else:
        parts.append(_absent("No two models answered the same questions, so there is no paired difference."))
    idle = [run.label for run in runs if not run.evaluations]
    if idle:
        parts.append(_absent(f"{_and(idle)}: no evaluation records in the folder, so no row in the table."))
    return _section("results", "Results", *parts)


def _curves(runs: Sequence[Run], colour: dict[str, str]) -> str:
    trained = [run for run in runs if run.log]
    if not trained:
        return _section("training", "Training", _absent("No run holds a log.jsonl, so there are no curves."))
    lead = (
        "<p>Faint: as logged. Strong: a running mean over 5 % of the steps. A run without a line in a panel does not "
        "have that quantity.</p>"
    )
    parts = [lead, _legend(colour, (run.label for run in trained)), _panels(curve_panels(trained, colour))]
    without = [run.label for run in runs if not run.log]
    if without:
        parts.append(_absent(f"{_and(without)}: no log.jsonl in the folder, so no curve."))
    return _section("training", "Training", *parts)


def _gaze_runs(runs: Sequence[Run]) -> int:
    return sum(bool(run.gaze or run.statistics) for run in runs)


def _statistics_table(run: Run, alone: bool) -> Table:
    table = gaze_table(run.statistics, f"{run.path.name}/gaze/statistics.json")
    return table if alone else Table(f"{table.title}: {run.label}", table.columns, table.rows, table.notes)


def _gaze(runs: Sequence[Run]) -> str:
    shown = [run for run in runs if run.gaze or run.statistics]
    if not shown:
        sentence = "No run holds a gaze/ folder, so no attention is shown."
        return _section("gaze", "Where they look", _absent(sentence))
    parts = [
        "<p>Brighter is more attention; each map is scaled to its own maximum. The green frame is the annotated "
        "region. Below each map: the share of its mass that falls inside the frame.</p>"
    ]
    for run in shown:
        if len(shown) > 1:
            parts.append(f"<h3>{html.escape(run.label)}</h3>")
        names = list(dict.fromkeys(name for sample in run.gaze for name in sample.maps))
        parts += [_sample(sample, names) for sample in run.gaze]
        if not run.gaze:
            parts.append(_absent(f"{run.label} holds no gaze/index.json, so no sample images are shown."))
        if run.statistics:
            parts.append(_statistics_table(run, alone=len(shown) == 1).to_html())
        else:
            parts.append(
                _absent(f"{run.label} holds no gaze/statistics.json, so there is no table of attention statistics.")
            )
    return _section("gaze", "Where they look", *parts)


def _sample(sample: GazeSample, names: Sequence[str]) -> str:
    frames = ""
    for box in sample.boxes:
        x1, y1, x2, y2 = (100 * min(1.0, max(0.0, corner)) for corner in box)
        frames += f"<b style='left:{x1:.2f}%;top:{y1:.2f}%;width:{x2 - x1:.2f}%;height:{y2 - y1:.2f}%'></b>"
    looks = []
    for who, uri, share in gaze_figures(sample, names):
        inside = "" if share is None else f"<span>{percent(share)} % in the frame</span>"
        alt = html.escape(f"{who}, sample {sample.id}", quote=True)
        looks.append(
            f"<figure><div class='frame'><img src='{uri}' alt='{alt}'>{frames}</div>"
            f"<figcaption>{html.escape(who)}{inside}</figcaption></figure>"
        )
    return (
        f"<div class='sample'><p>{html.escape(sample.question)} <strong>{html.escape(sample.answer)}</strong>"
        f"<span class='id'>{html.escape(sample.id)}</span></p><div class='looks'>{''.join(looks)}</div></div>"
    )


def _guide(notes: Sequence[str]) -> str:
    terms = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in GUIDE)
    said = "".join(f"<dd>{html.escape(note)}</dd>" for note in notes)
    own = f"<dt>Notes on these runs</dt>{said}" if said else ""
    return _section("guide", "How to read this page", f"<dl class='guide'>{terms}{own}</dl>")


def _provenance(runs: Sequence[Run], seed: int) -> str:
    sources = [
        [
            Cell(run.label if len(run.evaluations) == 1 else f"{run.label}, {one.name}"),
            Cell(one.source),
            Cell(one.digest[:16]),
            Cell(one.weights[:16] or EMPTY),
        ]
        for run in runs
        for one in run.evaluations
    ]
    columns = ["model", "records", "SHA-256 of the records", "SHA-256 of the weights"]
    parts = [
        Table("Where the figures come from", columns, sources).to_html().replace("<table>", "<table class='text'>")
    ]
    parts.append(_environments(runs))
    for run in runs:
        if run.recipe:
            text = html.escape(json.dumps(run.recipe, indent=2, ensure_ascii=False))
            parts.append(
                f"<details><summary>The whole recipe of {html.escape(run.label)}</summary>"
                f"<div class='scroll'><pre><code>{text}</code></pre></div></details>"
            )
    parts.append(f"<footer>Drawn by laavit {__version__}; bootstrap seed {seed}, {ITERATIONS} draws.</footer>")
    return _section("provenance", "Provenance", *parts)


def _environments(runs: Sequence[Run]) -> str:
    """Everything that the runs wrote down about themselves: one row a fact, one column a run."""
    known = [run for run in runs if run.environment or run.recipe]
    if not known:
        return _absent("No run holds an environment.json or a recipe.json, so versions and commands are not known.")
    facts = [
        {"recipe (SHA-256)": run.recipe_hash[:16] or EMPTY, "seed": str(run.recipe.get("seed", EMPTY))}
        | flatten({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in run.environment.items()})
        for run in known
    ]
    keys = list(dict.fromkeys(key for one in facts for key in one))
    body = [[Cell(key), *(Cell(one.get(key, EMPTY)) for one in facts)] for key in keys]
    table = Table("How the runs were made", ["", *(run.label for run in known)], body)
    return table.to_html().replace("<table>", "<table class='text'>")
