"""Micro-lab, pause tokens: four tokens that start as one, before the answer, and no loss on them."""

_base_ = ["./naive_sft.py"]

latents = dict(name="learned_token", count=4)
