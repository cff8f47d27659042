"""`python tools/analyse.py ...`: the same as `laavit analyse ...`."""

import sys

from laavit.cli import run

if __name__ == "__main__":
    sys.exit(run("analyse"))
