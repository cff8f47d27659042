"""``laavit COMMAND ...``: every door of the project; ``tools/COMMAND.py`` are the same doors."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.logging import RichHandler

from laavit.registry import UserError, nearest, sentence

#: command -> (module of laavit.commands, one line)
COMMANDS = {
    "data": ("data", "check a data set (counts, broken images, odd boxes, the paper's statistics); fetch benchmarks"),
    "train": ("train", "train a recipe"),
    "extract": ("extract", "write a teacher's traces"),
    "eval": ("evaluate", "answer benchmark questions through lmms-eval"),
    "export": ("export", "write a run as a stock Hugging Face folder"),
    "import": ("import_checkpoint", "a checkpoint of another layout as a stock Hugging Face folder"),
    "traces": ("traces", "read, check, plot, filter, subset, join and share traces"),
    "gaze": ("gaze", "where models look, on samples with boxes"),
    "analyse": ("analyse", "the paper's analyses: focus, gap, attention, overlay"),
    "sweep": ("sweep", "many runs: arms, grids and seeds, one table"),
    "study": ("study", "the micro-lab's sweeps and what its README says of them"),
    "report": ("report", "tables, curves and gaze maps of runs as one page"),
    "power": ("power", "how many questions a gain needs, and what gain they can show"),
    "plan": ("plan", "parameters and memory of a recipe, without loading weights"),
    "zoo": ("zoo", "the recipes of the model zoo as a table"),
    "list": ("parts", "all named parts, or those of one kind"),
    "show": ("parts", "one named part: arguments, source, description"),
    "microlab": ("microlab", "write the micro-lab's scenes and questions"),
    "demo": ("demo", "the embedded experiment, end to end"),
}

#: what a user's disk or path can do to any command; other errors of the system are ours, and show where they came from
DISK = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
#: how a command that was stopped goes on; others begin again
GOES_ON = {"train": " with --resume", "extract": "", "eval": "", "sweep": "", "study": ""}


def run(command: str, argv: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and exit code 2."""
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", datefmt="%H:%M:%S", handlers=[handler])
    logging.getLogger("laavit").setLevel(os.environ.get("LAAVIT_LOG", "INFO").upper())
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        module = importlib.import_module(f"laavit.commands.{COMMANDS[command][0]}")
        return int(module.main(arguments) or 0)
    except UserError as error:
        sys.stderr.write(f"error: {sentence(error)}\n")
        return 2
    except BrokenPipeError:  # `laavit list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in DISK or error.filename is None:
            raise
        sys.stderr.write(f"error: '{error.filename}' cannot be read or written: {error.strerror}\n")
        return 2
    except KeyboardInterrupt:
        how = GOES_ON.get(command)
        kept = "" if how is None else f"; what was finished is kept, and the same command{how} goes on"
        sys.stderr.write(f"stopped{kept}\n")
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``laavit`` script."""
    words = sys.argv[1:] if argv is None else list(argv)
    usage = "\n".join(f"  {name:8} {line}" for name, (_, line) in COMMANDS.items())
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(f"usage: laavit COMMAND ...   (each has --help)\n\n{usage}\n")
        return 0
    if words[0] not in COMMANDS:
        sys.stderr.write(f"error: no command is called '{words[0]}'; {nearest(words[0], COMMANDS)}\n")
        return 2
    return run(words[0], words[1:])


if __name__ == "__main__":
    sys.exit(main())
