"""lmms-eval is kept quiet; what this project has to say is not."""

from __future__ import annotations

import logging
import sys

import pytest
from rich.console import Console
from rich.logging import RichHandler

from laavit.evaluation.lmms import quiet_lmms_eval


def test_warnings_are_seen_while_bars_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("laavit.test")
    handler = RichHandler(console=Console(stderr=True, width=80))
    logger.addHandler(handler)
    try:
        with quiet_lmms_eval():
            sys.stderr.write("a bar of lmms-eval\n")
            logger.warning("mmvp has 8 questions")
    finally:
        logger.removeHandler(handler)
    seen = capsys.readouterr().err
    assert "mmvp has 8 questions" in seen and "a bar" not in seen
