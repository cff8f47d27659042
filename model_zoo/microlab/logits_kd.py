"""Micro-lab, knowledge distillation: the teacher's word probabilities along the gold answer; no latents."""

_base_ = ["./lavit.py"]

latents = None
gate = None
targets = dict(concept=None, trajectory=None, kd=dict(name="logits_kd", weight=1.0))
extract = dict(logits=8, passes=1)
traces = dict(path="runs/demo/traces_logits")
