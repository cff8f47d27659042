"""Micro-lab, control: semantics and gaze of another sample."""

_base_ = ["./lavit.py"]

targets = dict(concept=dict(control="shuffled"), trajectory=dict(control="shuffled"))
