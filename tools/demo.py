"""`python tools/demo.py ...`: the same as `laavit demo ...`."""

import sys

from laavit.cli import run

if __name__ == "__main__":
    sys.exit(run("demo"))
