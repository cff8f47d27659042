"""`python tools/study.py ...`: the same as `laavit study ...`."""

import sys

from laavit.cli import run

if __name__ == "__main__":
    sys.exit(run("study"))
