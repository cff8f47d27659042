"""``laavit microlab OUT``: the embedded experiment's scenes and questions, in the Visual-CoT format."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from laavit.commands.common import Parser
from laavit.microlab.dataset import DatasetSettings, write_dataset
from laavit.microlab.questions import HOP_KINDS, QUESTION_KINDS

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    defaults = DatasetSettings()
    parser = Parser(prog="microlab", description="Write the micro-lab's scenes and questions in the Visual-CoT format.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=defaults.train, help="scenes to train on")
    parser.add_argument("--val", type=int, default=defaults.val, help="scenes to choose settings on")
    parser.add_argument("--test", type=int, default=defaults.test, help="scenes to report on")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=[],
        help=f"questions of every scene: 'hops' ({', '.join(HOP_KINDS)}), or kinds by name (default: "
        f"{', '.join(QUESTION_KINDS)})",
    )
    options = parser.parse_args(list(argv))
    kinds = tuple(HOP_KINDS) if options.kinds == ["hops"] else tuple(options.kinds)
    settings = DatasetSettings(options.train, options.val, options.test, kinds)
    logger.info("written: %s", write_dataset(options.out, settings))
    return 0
