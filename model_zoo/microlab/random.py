"""Micro-lab, control: semantics' components and the gaze's values in a random order of each sample."""

_base_ = ["./lavit.py"]

targets = dict(concept=dict(control="random"), trajectory=dict(control="random"))
