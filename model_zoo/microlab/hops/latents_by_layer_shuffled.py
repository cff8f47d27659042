"""Hops, control: learned latents by layer, the hops in an order of each sample's own."""

_base_ = ["./latents_by_layer.py"]

targets = dict(latents=dict(order="shuffled"))
