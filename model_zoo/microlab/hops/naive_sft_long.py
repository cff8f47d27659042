"""Hops, Naive SFT and half as many steps more."""

_base_ = ["./naive_sft.py"]

train = dict(steps=1200)
