"""`python tools/extract.py ...`: the same as `laavit extract ...`."""

import sys

from laavit.cli import run

if __name__ == "__main__":
    sys.exit(run("extract"))
