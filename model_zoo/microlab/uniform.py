"""Micro-lab, control: the same share of attention everywhere in place of the gaze."""

_base_ = ["./lavit.py"]

targets = dict(trajectory=dict(control="uniform"))
