"""Micro-lab, control: the header and the answer follow the boxes; no latents, no gate."""

_base_ = ["./lavit.py"]

latents = None
gate = None
targets = dict(concept=None, trajectory=dict(_delete_=True, name="box_no_latents", weight=1.0, layers=(-2, -1)))
