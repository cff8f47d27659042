"""`python tools/sweep.py ...`: the same as `laavit sweep ...`."""

import sys

from laavit.cli import run

if __name__ == "__main__":
    sys.exit(run("sweep"))
