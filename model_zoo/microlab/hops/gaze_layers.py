"""Hops, no latents: header and answer follow hop after hop, layer by layer."""

_base_ = ["./naive_sft.py"]

targets = dict(answer=dict(name="box_layers_no_latents", weight=1.0))
