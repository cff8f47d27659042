"""Control: also samples whose gaze misses the boxes (the alignment filter is left out)."""

_base_ = ["../lavit/lavit.py"]

traces = dict(select=("correctness",))
