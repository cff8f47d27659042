"""Hops, four fed-back latents without a map; the answer follows the last hop."""

_base_ = ["./feedback.py"]

targets = dict(answer=dict(name="box_final", rows=("answer",), reduction="mean", weight=1.0, layers=(-2, -1)))
