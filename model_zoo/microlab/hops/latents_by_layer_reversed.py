"""Hops, control: learned latents by layer, the hops from the last to the first."""

_base_ = ["./latents_by_layer.py"]

targets = dict(latents=dict(order="reversed"))
