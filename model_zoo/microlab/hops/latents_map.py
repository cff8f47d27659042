"""Hops, four learned latents that follow the boxes of all hops at once."""

_base_ = ["./latents.py"]

targets = dict(latents=dict(name="box", weight=1.0, layers=(-2, -1)))
