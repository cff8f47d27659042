"""Micro-lab, "w/o semantic reconstruction"."""

_base_ = ["./lavit.py"]

targets = dict(concept=None)
