"""Micro-lab, LaViT with two to six latents: each sample has a number of its own."""

_base_ = ["./lavit.py"]

latents = dict(count=(2, 6))
