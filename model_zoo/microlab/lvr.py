"""Micro-lab, LVR: hidden states fed back, each led to a patch inside the boxes."""

_base_ = ["./naive_sft.py"]

latents = dict(name="feedback", count=8)
targets = dict(region=dict(name="region", weight=0.1))
