"""Hops, learned latents by layer, and the answer follows the last hop."""

_base_ = ["./latents_by_layer.py"]

targets = dict(answer=dict(name="box_final", rows=("answer",), reduction="mean", weight=1.0, layers=(-2, -1)))
