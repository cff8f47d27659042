"""`python tools/export.py ...`: the same as `laavit export ...`."""

import sys

from laavit.cli import run

if __name__ == "__main__":
    sys.exit(run("export"))
