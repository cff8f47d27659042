"""Control: the same share of attention everywhere in place of the gaze (semantics as they are)."""

_base_ = ["../lavit/lavit.py"]

targets = dict(trajectory=dict(control="uniform"))
