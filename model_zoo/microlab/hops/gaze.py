"""Hops, no latents: header and answer follow the boxes of all hops at once."""

_base_ = ["./naive_sft.py"]

targets = dict(answer=dict(name="box_no_latents", weight=1.0, layers=(-2, -1)))
