"""`python tools/train.py ...`: the same as `laavit train ...`."""

import sys

from laavit.cli import run

if __name__ == "__main__":
    sys.exit(run("train"))
