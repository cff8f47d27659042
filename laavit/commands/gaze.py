"""``tools/gaze.py OUT NAME=FOLDER ...``: where models look, on samples with boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from laavit.commands.common import Parser
from laavit.data import VisualCoT


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = Parser(
        prog="gaze",
        description="Attention maps and their statistics for any models, written where tools/report.py finds them "
        "(RUN/gaze).",
    )
    parser.add_argument("out", type=Path, help="folder to write, for example RUN/gaze")
    parser.add_argument(
        "lookers", nargs="+", help="NAME=FOLDER, or NAME=FOLDER@latents, or NAME=FOLDER@header+answer@-2,-1"
    )
    parser.add_argument("--annotations", type=Path, required=True, help="Visual-CoT JSON with boxes")
    parser.add_argument("--root", type=Path, required=True, help="its image folder")
    parser.add_argument("--limit", type=int, default=300, help="samples looked at")
    parser.add_argument("--show", type=int, default=6, help="samples drawn")
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args(list(argv))
    from laavit.evaluation.gaze import Looker, write_gaze

    samples = VisualCoT(options.annotations, options.root, limit=options.limit)
    lookers = [Looker.parse(text) for text in options.lookers]
    write_gaze(options.out, lookers, samples, options.show, options.batch_size)
    return 0
