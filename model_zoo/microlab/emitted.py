"""Micro-lab, LaViT whose student writes the latent tokens itself."""

_base_ = ["./lavit.py"]

latents = dict(name="emitted")
