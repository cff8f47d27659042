"""Hops, learned latents by layer that start as the token that predicts an answer."""

_base_ = ["./latents_by_layer.py"]

latents = dict(init="\n")
