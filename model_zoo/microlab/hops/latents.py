"""Hops, four learned latents and no gaze."""

_base_ = ["./naive_sft.py"]

latents = dict(name="learned", count=4)
