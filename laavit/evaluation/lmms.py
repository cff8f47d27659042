"""lmms-eval's parts that the project uses, imported without its warnings, and its talk kept off the screen."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator

from loguru import logger as lmms_logger

lmms_logger.disable("lmms_eval")  # before the import, which warns about every optional package

from lmms_eval.api.task import Task  # noqa: E402
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402

lmms_logger.enable("lmms_eval")

__all__ = ["Task", "TaskManager", "quiet_lmms_eval", "simple_evaluate"]

logger = logging.getLogger(__name__)


class _Drawn(io.StringIO):
    """Takes what is drawn on stderr; rich's consoles, which are this project's, find the real one through it."""

    def __init__(self) -> None:
        super().__init__()
        self.rich_proxied_file = sys.stderr


@contextlib.contextmanager
def quiet_lmms_eval() -> Iterator[None]:
    """lmms-eval's logger off, and what it draws on stderr (bars of its own) kept for the debug log."""
    drawn = _Drawn()
    lmms_logger.disable("lmms_eval")
    try:
        with contextlib.redirect_stderr(drawn):
            yield
    finally:
        lmms_logger.enable("lmms_eval")
        if text := drawn.getvalue().strip():
            logger.debug("lmms-eval wrote: %s", text)
