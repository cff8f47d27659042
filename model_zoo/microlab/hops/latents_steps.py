"""Hops, four learned latents, each of which follows its own hop."""

_base_ = ["./latents.py"]

targets = dict(latents=dict(name="box_steps", weight=1.0, layers=(-2, -1)))
