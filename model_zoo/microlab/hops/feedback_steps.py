"""Hops, four fed-back latents, each of which follows its own hop."""

_base_ = ["./feedback.py"]

targets = dict(latents=dict(name="box_steps", weight=1.0, layers=(-2, -1)))
