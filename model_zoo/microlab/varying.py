"""Micro-lab, LaViT with two to eight latents: each sample has a number of its own."""

_base_ = ["./lavit.py"]

latents = dict(_delete_=True, name="varying")
