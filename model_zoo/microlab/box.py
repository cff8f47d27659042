"""Micro-lab, control: the boxes in place of the teacher's gaze."""

_base_ = ["./lavit.py"]

targets = dict(trajectory=dict(_delete_=True, name="box", weight=1.0, layers=(-2, -1)))
