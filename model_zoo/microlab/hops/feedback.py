"""Hops, four fed-back latents and no gaze."""

_base_ = ["./naive_sft.py"]

latents = dict(name="feedback", count=4)
