"""`python tools/report.py ...`: the same as `laavit report ...`."""

import sys

from laavit.cli import run

if __name__ == "__main__":
    sys.exit(run("report"))
