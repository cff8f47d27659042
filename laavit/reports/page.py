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
from laavit.evaluation.statistics import holm
from laavit.files import write_text
from laavit.reports.figures import Figured, accuracy_panels, colours, curve_panels, gaze_figures
from laavit.reports.guide import GUIDE
from laavit.reports.rows import ITERATIONS, Comparison, Row, comparisons, ordered, result_rows
from laavit.reports.runs import GazeSample, Run, load_runs
from laavit.reports.sections import absent, analyses, interventions, listed, section
from laavit.reports.sheet import PAPER
from laavit.reports.table import EMPTY, Cell, Table, check_format, render
from laavit.reports.tables import (
    comparisons_table,
    flatten,
    gaze_table,
    p_text,
    percent,
    recipe_table,
    results_table,
)

TITLE = "Where the student looks, and what it answers"
#: models that the page's first sentence names, and runs whose curves are all drawn
MANY, MOST_CURVES = 6, 12


def build_page(
    runs: Sequence[Path | str],
    out: Path,
    *,
    title: str = TITLE,
    labels: Sequence[str | None] | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
    published: Sequence[Table] = (),
) -> Path:
    """Write one HTML page about several run folders.

    Args:
        runs: run folders in the order of the rows, LABEL=RUN,RUN for seeds of one model, or sweeps; a baseline comes
            before what is compared with it. With ``published`` there may be none.
        out: the page. title: its heading.
        labels: what the rows are called (by default the folders' names).
        notes: sentences that the reader has to know, shown on top and in the guide.
        seed: of the bootstrap. published: tables as data (``laavit.reports.sheet``), in a section of their own.

    Returns: ``out``.

    Raises:
        UserError: a folder is missing or damaged, two runs share a label, or no run was evaluated.
    """
    if not runs and published:
        body = "\n".join([_heading(title, "", (), notes), _published(published), _guide(notes)])
    else:
        body = _about(load_runs(runs, labels), title, notes, seed, published)
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


def _about(loaded: Sequence[Run], title: str, notes: Sequence[str], seed: int, published: Sequence[Table]) -> str:
    """The page's sections about some runs."""
    rows = result_rows(loaded)
    found = comparisons(rows, ITERATIONS, seed)
    colour = colours(ordered(run.label for run in loaded))
    sections = [
        _header(title, loaded, rows, found, notes),
        _results(loaded, rows, found, colour),
        _published(published) if published else "",
        _gaze(loaded),
        interventions(rows),
        analyses(loaded),
        _curves(loaded, colour),
        _compared(first_seeds(loaded)),
        _guide(notes),
        _provenance(loaded, rows, seed),
    ]
    return "\n".join(filter(None, sections))


def write_table(
    runs: Sequence[Path | str],
    out: Path,
    *,
    title: str = TITLE,
    labels: Sequence[str] | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Write the tables of ``build_page`` as Markdown, LaTeX or CSV: same arguments, same figures, same errors.

    Returns: ``out``.
    """
    suffix = check_format(Path(out).suffix)
    loaded = load_runs(runs, labels)
    rows = result_rows(loaded)
    found = comparisons(rows, ITERATIONS, seed)
    tables = [results_table(rows), comparisons_table(found, ITERATIONS)] if found else [results_table(rows)]
    tables += [_statistics_table(run, alone=_gaze_runs(loaded) == 1) for run in loaded if run.statistics]
    if suffix != ".md":
        write_text(Path(out), render(tables, suffix))
        return Path(out)
    finding = [f"- {one}" for one in _headline(rows, found)]
    parts = [f"## {title}\n", "\n".join([*finding, *(f"- {note}" for note in notes)]) + "\n"]
    parts += [table.to_markdown() for table in tables]
    parts.append("Records: " + "; ".join(f"{row.label}: {_named(row)}" for row in rows) + ".\n")
    out = Path(out)
    write_text(out, "\n".join(parts))
    return out


def _named(row: Row) -> str:
    return ", ".join(f"`{one.source}`" for one in row.evaluations)


def first_seeds(runs: Sequence[Run]) -> list[Run]:
    """One run of each model: the first that was given."""
    return list({run.label: run for run in reversed(runs)}.values())[::-1]


def _headline(rows: Sequence[Row], found: Sequence[Comparison]) -> list[str]:
    """What the reader came for: the last model with latents against the others, and with its latents masked.

    Of many models it is the best one, and how many differences are left once all comparisons are counted.
    """
    on = [row for row in rows if not row.evaluation.way]
    if not on:
        return []
    many = len(on) > MANY
    chosen = max(on, key=lambda row: one.mean if (one := row.score()) else -1.0) if many else on[-1]
    best = [one for one in found if one.row is chosen and not one.reference.evaluation.way][::-1]
    masked = [one for one in found if one.reference is chosen and one.row.evaluation.latents == "off"]
    said = [_plain(one) for one in best + masked]
    if many and found:
        holds = sum(p < 0.05 for p in holm([one.gain.p for one in found]))
        said.append(
            f"{chosen.label} is the highest of {len(on)} models, which flatters it; of the {len(found)} differences "
            f"below {holds or 'none'} hold{'s' if holds == 1 else ''} at 5 % after Holm's adjustment for their number."
        )
    return said


def _plain(one: Comparison) -> str:
    """A comparison as a sentence; nothing in it is typed in by hand."""
    ours, theirs, gain = one.row.score(), one.reference.score(), one.gain
    if ours is None or theirs is None:  # what is compared was answered
        raise ValueError(f"'{one.row.label}' or '{one.reference.label}' has no answers")
    apart = ours.low > theirs.high or theirs.low > ours.high
    own = f"their own 95 % intervals {'do not overlap' if apart else 'overlap'}"
    test = "McNemar's p" if gain.exact else "p"
    return (
        f"{one.row.label} answers {percent(ours.mean)} % of {ours.n} questions, {one.reference.label} "
        f"{percent(theirs.mean)} %{'' if ours.n == theirs.n else f' of {theirs.n}'}: {100 * gain.mean:+.1f} points "
        f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] on the {gain.n} they share, {test} {p_text(gain.p)}; {own}."
    )


def _header(
    title: str, runs: Sequence[Run], rows: Sequence[Row], found: Sequence[Comparison], notes: Sequence[str]
) -> str:
    labels = ordered(run.label for run in runs)
    questions = len({record.key for row in rows for one in row.evaluations for record in one.records})
    lead = (
        f"{listed(labels) if len(labels) <= MANY else f'{len(labels)} models'} on {questions} questions. Every figure "
        "below is computed from per-sample records; how to read them stands at the end."
    )
    return _heading(title, lead, _headline(rows, found), notes)


def _heading(title: str, lead: str, findings: Sequence[str], notes: Sequence[str]) -> str:
    sentences = "".join(f"<p>{html.escape(one)}</p>" for one in findings)
    finding = f"<div class='finding'>{sentences}</div>" if sentences else ""
    said = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in notes)
    return f"<header><h1>{html.escape(title)}</h1><p class='lead'>{html.escape(lead)}</p>{finding}{said}</header>"


def _compared(runs: Sequence[Run]) -> str:
    parts = []
    table = recipe_table(runs)
    without = [run.label for run in runs if not run.recipe]
    if table is not None:
        parts.append(table.to_html().replace("<table>", "<table class='text'>"))
    else:
        parts.append(absent("There are no two runs whose recipes differ, so there is nothing to set side by side."))
    if without:
        parts.append(
            absent(f"{listed(without)}: no recipe.json in the folder, so it was evaluated but not trained here.")
        )
    return section("compared", "What was compared", *parts)


def _published(tables: Sequence[Table]) -> str:
    parts = [table.to_html() for table in tables]
    if any(PAPER in cell.text for row in tables[0].rows for cell in row[: tables[0].wide]):
        return section("published", "The published table", *parts)
    return section("arms", "The table", *parts)


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
    parts = [_panels(accuracy_panels(rows, colour)), results_table(rows).to_html()]
    if found:
        parts.append(comparisons_table(found, ITERATIONS).to_html())
    else:
        parts.append(absent("No two models answered the same questions, so there is no paired difference."))
    idle = [run.label for run in runs if not run.evaluations]
    if idle:
        parts.append(absent(f"{listed(idle)}: no evaluation records in the folder, so no row in the table."))
    return section("results", "Results", *parts)


def _curves(runs: Sequence[Run], colour: dict[str, str]) -> str:
    trained = [run for run in runs if run.log]
    if not trained:
        return section("training", "Training", absent("No run holds a log.jsonl, so there are no curves."))
    drawn = trained if len(trained) <= MOST_CURVES else first_seeds(trained)
    parts = [_legend(colour, ordered(run.label for run in drawn)), _panels(curve_panels(drawn, colour))]
    if len(drawn) < len(trained):
        parts.append(absent(f"Of each model the first seed is drawn; {len(trained)} runs were trained."))
    without = [run.label for run in runs if not run.log]
    if without:
        parts.append(absent(f"{listed(without)}: no log.jsonl in the folder, so no curve."))
    return section("training", "Training", *parts)


def _gaze_runs(runs: Sequence[Run]) -> int:
    return sum(bool(run.gaze or run.statistics) for run in runs)


def _statistics_table(run: Run, alone: bool) -> Table:
    table = gaze_table(run.statistics, f"{run.path.name}/gaze/statistics.json")
    return table if alone else Table(f"{table.title}: {run.label}", table.columns, table.rows, table.notes)


def _gaze(runs: Sequence[Run]) -> str:
    shown = [run for run in runs if run.gaze or run.statistics]
    if not shown:
        sentence = "No run holds a gaze/ folder, so no attention is shown."
        return section("gaze", "Where they look", absent(sentence))
    parts = []
    for run in shown:
        if len(shown) > 1:
            parts.append(f"<h3>{html.escape(run.label)}</h3>")
        names = list(dict.fromkeys(name for sample in run.gaze for name in sample.maps))
        parts += [_sample(sample, names) for sample in run.gaze]
        if not run.gaze:
            parts.append(absent(f"{run.label} holds no gaze/index.json, so no sample images are shown."))
        if run.statistics:
            parts.append(_statistics_table(run, alone=len(shown) == 1).to_html())
        else:
            parts.append(
                absent(f"{run.label} holds no gaze/statistics.json, so there is no table of attention statistics.")
            )
    return section("gaze", "Where they look", *parts)


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
    return section("guide", "How to read this page", f"<dl class='guide'>{terms}{own}</dl>")


def _provenance(runs: Sequence[Run], rows: Sequence[Row], seed: int) -> str:
    sources = [
        [Cell(row.label), Cell(one.source), Cell(one.digest[:16]), Cell(one.weights[:16] or EMPTY)]
        for row in rows
        for one in row.evaluations
    ]
    columns = ["model", "records", "SHA-256 of the records", "SHA-256 of the weights"]
    parts = [
        Table("Where the figures come from", columns, sources).to_html().replace("<table>", "<table class='text'>")
    ]
    parts.append(_environments(first_seeds(runs)))
    if len(first_seeds(runs)) < len(runs):
        parts.append(absent("Of models with several seeds the first run is shown; the others differ in their seeds."))
    for run in first_seeds(runs):
        if run.recipe:
            text = html.escape(json.dumps(run.recipe, indent=2, ensure_ascii=False))
            parts.append(
                f"<details><summary>The whole recipe of {html.escape(run.label)}</summary>"
                f"<div class='scroll'><pre><code>{text}</code></pre></div></details>"
            )
    parts.append(f"<footer>Drawn by laavit {__version__}; bootstrap seed {seed}, {ITERATIONS} draws.</footer>")
    return section("provenance", "Provenance", *parts)


def _environments(runs: Sequence[Run]) -> str:
    """Everything that the runs wrote down about themselves: one row a fact, one column a run."""
    known = [run for run in runs if run.environment or run.recipe]
    if not known:
        return absent("No run holds an environment.json or a recipe.json, so versions and commands are not known.")
    facts = [
        {"recipe (SHA-256)": run.recipe_hash[:16] or EMPTY, "seed": str(run.recipe.get("seed", EMPTY))}
        | flatten({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in run.environment.items()})
        for run in known
    ]
    keys = list(dict.fromkeys(key for one in facts for key in one))
    body = [[Cell(key), *(Cell(one.get(key, EMPTY)) for one in facts)] for key in keys]
    table = Table("How the runs were made", ["", *(run.label for run in known)], body)
    return table.to_html().replace("<table>", "<table class='text'>")
