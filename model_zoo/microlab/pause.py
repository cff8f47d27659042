"""Micro-lab, pause tokens: four learned tokens before the answer and no loss on them."""

_base_ = ["./naive_sft.py"]

latents = dict(name="learned", count=4)
