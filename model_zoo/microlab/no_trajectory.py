"""Micro-lab, "w/o trajectory alignment"."""

_base_ = ["./lavit.py"]

targets = dict(trajectory=None)
