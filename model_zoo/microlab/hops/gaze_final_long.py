"""Hops, no latents, the last hop, and half as many steps more."""

_base_ = ["./gaze_final.py"]

train = dict(steps=1200)
