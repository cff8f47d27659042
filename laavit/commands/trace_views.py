"""What ``laavit traces`` prints: a store's figures, one trace, the difference of two stores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from laavit.structures import Sample, Trace
from laavit.traces.diff import Difference
from laavit.traces.funnel import Funnel, SourceRow
from laavit.traces.gaze import top_k_indices
from laavit.traces.store import TraceStore
from laavit.traces.summary import MEASURES, Summary, measure, settings_lines

#: the header's keys that say who made a store and how; the rest is printed with --header
CHIEF = ("teacher", "laavit", "weights_sha256", "width", "depth", "gaze_top_k", "semantics_dtype")


def console() -> Console:
    """Where results go: the terminal at its width, a pipe with one line a row."""
    found = Console(soft_wrap=True, highlight=False, markup=False)
    return found if found.is_terminal else Console(width=240, highlight=False, markup=False)


def table(titles: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    """A plain table; columns after the first are right-aligned where they hold numbers."""
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    content = [[_text(cell) for cell in row] for row in rows]
    for number, name in enumerate(titles):
        numeric = number > 0 and all(row[number][:1] in "0123456789-" for row in content if row[number])
        shown.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in content:
        shown.add_row(*row)
    return shown


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def share(count: float, total: float) -> str:
    """Per cent with two digits, as the paper gives them."""
    return f"{100 * count / total:.2f} %" if total else "-"


def print_store(store: TraceStore, whole_header: bool = False) -> None:
    """What a store is: traces, bytes, what made it, what was put aside."""
    out = console()
    planned = f" of {store.planned} samples" if store.planned != len(store) else ""
    out.print(f"{store.path}: {len(store)} traces{planned}, {store.bytes_per_sample():.0f} bytes each")
    if store.missing:
        out.print(f"{len(store.missing)} shards are missing or damaged (laavit traces verify names them)")
    lines = settings_lines(store.header)
    chosen = lines if whole_header else [(k, v) for k, v in lines if k in CHIEF or k.startswith(("settings.", "data."))]
    out.print(table(("header", "value"), chosen))
    if store.quarantined:
        reasons: dict[str, list[str]] = {}
        for key, reason in store.quarantined.items():
            reasons.setdefault(reason.partition(":")[0], []).append(key)
        counted = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
        rows = [
            (len(keys), reason, ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")) for reason, keys in counted
        ]
        out.print(table(("put aside", "reason", "samples"), rows))


def print_summary(summary: Summary, sparse: int | None) -> None:
    """The figures of answers and maps."""
    rows = [
        (MEASURES[name], each.count, each.mean, each.deviation, each.low, each.high)
        for name, each in summary.figures.items()
    ]
    out = console()
    out.print(table(("figure", "n", "mean", "deviation", "least", "greatest"), rows))
    if sparse is not None:
        out.print(f"maps hold their {sparse} strongest tokens alone: their statistics are not those of whole maps")
    for count, what in ((summary.flat, "maps are zero everywhere"), (summary.unanswered, "answers are empty")):
        if count:
            out.print(f"{count} {what}")
    if summary.blind:
        out.print(f"{summary.blind} traces have an answer given without the image")


def print_funnel(found: Funnel) -> None:
    """What every filter leaves, alone and together with those before it."""
    out = console()
    if not found.stages:
        out.print("no filter was run (laavit traces judge RECIPE)")
        return
    rows: list[tuple[object, ...]] = [("all traces", found.traces, "", found.traces, "")]
    for stage in found.stages:
        alone, together = share(stage.alone, found.traces), share(stage.together, found.traces)
        rows.append((stage.name, stage.alone, alone, stage.together, together))
    out.print(table(("filter", "alone", "", "with those above", ""), rows))
    for name, count in found.unjudged.items():
        out.print(f"{count} traces have no verdict of '{name}': run it again")


def print_sources(rows: Sequence[SourceRow]) -> None:
    """The table by source set, beside the paper's."""
    total = sum(row.passed for row in rows)
    shown = [
        (
            r.source,
            r.traces,
            r.passed,
            share(r.passed, total),
            r.paper,
            None if r.paper_share is None else share(r.paper_share, 1),
        )
        for r in rows
    ]
    paper = sum(row.paper or 0 for row in rows)
    shown.append(("all", sum(row.traces for row in rows), total, share(total, total), paper, share(1, 1)))
    console().print(table(("source", "traces", "pass all", "share", "LaViT-SFT-15K", "share"), shown))


def print_trace(store: TraceStore, trace: Trace, sample: Sample | None) -> None:
    """One trace as text: words, tiles, figures, the strongest tokens, the steps."""
    out = console()
    rows: list[tuple[object, object]] = [("sample", trace.sample_id)]
    if sample is not None:
        rows += [("source", sample.source), ("question", sample.question), ("ground truth", sample.answer)]
    rows += [("answer", trace.answer), ("without the image", trace.blind_answer)]
    tiles = ", ".join(f"{t.height} x {t.width} on image {t.image + 1}" for t in trace.tiles)
    rows += [("tiles", tiles), ("semantics", " x ".join(map(str, trace.semantics.shape)))]
    figures = measure(trace, sample.boxes if sample is not None else ())
    rows += [(MEASURES[name], value) for name, value in figures.items()]
    strongest = [(int(i), float(trace.gaze[i])) for i in top_k_indices(trace.gaze, 8)]
    rows.append(("strongest tokens", ", ".join(f"{token}: {value:.3g}" for token, value in strongest if value > 0)))
    for name, verdict in trace.verdicts.items():
        rows.append((f"filter {name}", f"{'pass' if verdict else 'fail'}, {_text(trace.scores.get(name))}"))
    out.print(table(("", ""), [(key, value) for key, value in rows if value is not None]))
    if trace.steps:
        steps = []
        for place, step in enumerate(trace.steps, 1):
            best = int(step.gaze.argmax())
            steps.append((place, repr(step.text), step.group, best, float(step.gaze[best])))
        out.print(table(("step", "text", "group", "strongest token", "value"), steps))


def print_difference(found: Difference, names: tuple[Path, Path], show: int = 5) -> None:
    """What differs, one line a kind; figures over the samples that both stores have."""
    out = console()
    for text in found.header:
        out.print(f"header: {text}")
    for path, keys in zip(names, found.only, strict=True):
        _listed(f"only in {path}", keys, show)
    _listed("put aside differently", found.quarantined, show)
    for what, keys in (
        ("another answer", found.answers),
        ("another blind answer", found.blind),
        ("other tiles", found.tiles),
        ("other steps", found.steps),
        ("semantics of another shape", found.semantics),
        ("other answer logits", found.logits),
    ):
        _listed(what, keys, show)
    for name, keys in found.verdicts.items():
        _listed(f"judged differently by '{name}'", keys, show)
    figures: list[tuple[str, Mapping[str, float], bool]] = [
        ("KL of the maps, nats", found.gaze_kl, True),
        ("greatest difference of a map", found.gaze_abs, True),
        ("difference of the attention on the image", found.mass_abs, True),
        ("cosine of the semantics", found.cosine, False),
    ]
    rows = []
    for label, values, high in figures:
        known = {key: value for key, value in values.items() if not math.isnan(value)}
        if known:
            worst = (max if high else min)(known, key=known.__getitem__)
            rows.append((label, sum(known.values()) / len(known), known[worst], worst))
    if rows:
        out.print(table(("figure", "mean", "worst", "at sample"), rows))
    verdict = "the stores are equal" if found.equal else "the stores differ"
    out.print(f"{found.same} of {found.common} common samples are equal bit for bit; {verdict}")


def _listed(what: str, keys: Sequence[str], show: int) -> None:
    if keys:
        console().print(f"{what}: {len(keys)} ({', '.join(keys[:show])}{', ...' if len(keys) > show else ''})")
