"""Control: the components of the semantics, and the values of the gaze, in a random order of each sample."""

_base_ = ["../lavit/lavit.py"]

targets = dict(concept=dict(control="random"), trajectory=dict(control="random"))
