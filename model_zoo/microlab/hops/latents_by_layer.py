"""Hops, four learned latents, each of which follows its own hop in the layers of that hop."""

_base_ = ["./latents.py"]

targets = dict(latents=dict(name="box_steps_by_layer", weight=1.0))
