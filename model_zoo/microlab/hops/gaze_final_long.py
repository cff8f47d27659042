"""Hops, no latents, the last hop, and three quarters more steps: the time that fed-back latents take."""

_base_ = ["./gaze_final.py"]

train = dict(steps=1400)
