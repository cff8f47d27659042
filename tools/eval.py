"""`python tools/eval.py ...`: the same as `laavit eval ...`."""

import sys

from laavit.cli import run

if __name__ == "__main__":
    sys.exit(run("eval"))
