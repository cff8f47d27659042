"""Micro-lab, control: the header and the answer follow the gaze; no latents, no gate."""

_base_ = ["./lavit.py"]

latents = None
gate = None
targets = dict(concept=None, trajectory=dict(name="trajectory_no_latents"))
