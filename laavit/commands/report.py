"""``tools/report.py RUNS... --out page.html``: tables, curves and gaze maps of runs as one page."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from laavit.commands.common import Parser
from laavit.registry import UserError
from laavit.reports import build_page, write_table

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = Parser(prog="report", description="One self-contained page from run folders; give the baseline first.")
    parser.add_argument(
        "runs", type=Path, nargs="+", help="run folders (with eval/, and gaze/ where tools/gaze.py was run)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="an .html page, or .md for the table alone"
    )
    parser.add_argument("--labels", nargs="+", help="names of the rows, one a run; default the recipes' titles")
    parser.add_argument("--title", default="laavit: runs compared")
    parser.add_argument("--notes", nargs="*", default=[], help="sentences that a reader must know, shown at the top")
    options = parser.parse_args(list(argv))
    if options.labels and len(options.labels) != len(options.runs):
        raise UserError(f"--labels: {len(options.labels)} names for {len(options.runs)} runs")
    write = write_table if options.out.suffix == ".md" else build_page
    written = write(options.runs, options.out, title=options.title, labels=options.labels, notes=tuple(options.notes))
    logger.info("written: %s", written)
    return 0
