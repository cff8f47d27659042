"""Micro-lab, LaViT with the header and the answer following the gaze beside the latents."""

_base_ = ["./lavit.py"]

targets = dict(own=dict(name="trajectory_no_latents", weight=1.0, layers=(-2, -1)))
