"""Hops, Naive SFT and three quarters more steps: the time that fed-back latents take."""

_base_ = ["./naive_sft.py"]

train = dict(steps=1400)
