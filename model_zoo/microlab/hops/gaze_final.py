"""Hops, no latents: header and answer follow the boxes of the last hop."""

_base_ = ["./naive_sft.py"]

targets = dict(answer=dict(name="box_final_no_latents", weight=1.0, layers=(-2, -1)))
