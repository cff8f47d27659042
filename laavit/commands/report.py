"""``tools/report.py RUNS... --out page.html``: tables, curves and gaze of runs, and published tables."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from laavit.commands.common import Parser
from laavit.files import write_text
from laavit.registry import UserError
from laavit.reports import build_page, write_table
from laavit.reports.runs import split_word
from laavit.reports.sheet import fill, sheet_tables
from laavit.reports.spec import Sheet, load_sheet
from laavit.reports.table import Table, check_format, render

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = Parser(
        prog="report",
        description="One self-contained page from run folders, or its tables; give the baseline first.",
        epilog="Seeds of one model: LABEL=RUN,RUN (with --table: ROW=RUN,RUN). A sweep's folder stands for its runs.",
    )
    parser.add_argument("runs", nargs="*", help="run folders (with eval/, and gaze/ where tools/gaze.py was run)")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="a page (.html), or its tables (.md, .tex, .csv)"
    )
    parser.add_argument("--table", help="a table of eval/tables (table1, table3, tableA2, microlab), or a .yaml file")
    parser.add_argument("--power", action="store_true", help="with --table: what gain its questions can show")
    parser.add_argument("--protocol", choices=("lmms", "paper"), help="with --table: evaluations made under it alone")
    parser.add_argument("--labels", nargs="+", help="names of the rows, one a run; default the folders' names")
    parser.add_argument("--title", default="laavit: runs compared")
    parser.add_argument("--notes", nargs="*", default=[], help="sentences that a reader must know, shown at the top")
    options = parser.parse_args(list(argv))
    if not options.runs and not options.table:
        raise UserError("report needs run folders, or --table for the printed figures alone")
    if options.labels and len(options.labels) != len(options.runs):
        raise UserError(f"--labels: {len(options.labels)} names for {len(options.runs)} runs")
    if not options.table and (options.power or options.protocol):
        raise UserError("--power and --protocol go with --table; `laavit power` computes without runs")
    check_format(options.out.suffix)
    sheet = load_sheet(options.table) if options.table else None
    published = sheet_tables(sheet, fill(sheet, options.runs, options.protocol), options.power) if sheet else []
    logger.info("written: %s", _write(options, sheet, published))
    return 0


def _write(options: Namespace, sheet: Sheet | None, published: Sequence[Table]) -> Path:
    out: Path = options.out
    if published and out.suffix != ".html":
        write_text(out, render(published, out.suffix))
        return out
    described = {"title": options.title, "notes": tuple(options.notes), "labels": options.labels}
    if out.suffix != ".html":
        return write_table(options.runs, out, **described)
    if sheet is not None:
        described["labels"] = options.labels or [_row_label(word, sheet) for word in options.runs]
        described["title"] = sheet.title if options.title == "laavit: runs compared" else options.title
    return build_page(options.runs, out, published=published, **described)


def _row_label(word: str, sheet: Sheet) -> str | None:
    """What the row of ROW=RUN is called; None for a run alone."""
    name, _ = split_word(word)
    return None if name is None else sheet.line(name).label
