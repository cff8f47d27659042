"""Micro-lab, LaViT with hidden states fed back in place of learned tokens."""

_base_ = ["./lavit.py"]

latents = dict(name="feedback")
