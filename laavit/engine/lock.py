"""One run a folder: a second one would clear away what the first is writing, and both would write one log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from laavit.engine.distributed import rank_and_world
from laavit.registry import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"

logger = logging.getLogger("laavit.engine")


@contextmanager
def only_run(work_dir: Path) -> Iterator[None]:
    """Have a run's folder for oneself, in process 0 for all of them.

    The system lets go of it when the process ends, however it does. It is a record lock: data workers do not inherit
    it, and network file systems pass it on to other machines. Where there are no locks (Windows, a file system without
    them), nothing is refused.

    Raises:
        UserError: another process trains in the folder, or it cannot be written.
    """
    if fcntl is None or rank_and_world()[0]:
        yield
        return
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        file = (work_dir / FILE).open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"the run folder '{work_dir}' cannot be written: {error}") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # either, says POSIX
            raise UserError(
                f"another process is training in '{work_dir}' at this moment: wait for it, or choose another folder"
            ) from None
        except OSError as error:
            logger.debug("'%s' cannot be locked: %s", work_dir, error)
        yield
