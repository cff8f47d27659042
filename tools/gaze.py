"""`python tools/gaze.py ...`: the same as `laavit gaze ...`."""

import sys

from laavit.cli import run

if __name__ == "__main__":
    sys.exit(run("gaze"))
