"""Hops, control: no latents, the layers follow the hops from the last to the first."""

_base_ = ["./gaze_layers.py"]

targets = dict(answer=dict(order="reversed"))
