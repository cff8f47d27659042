"""Knowledge distillation (arXiv 1503.02531): the teacher's word probabilities along the gold answer; no latents."""

_base_ = ["../lavit/lavit.py"]

latents = None
gate = None
targets = dict(concept=None, trajectory=None, kd=dict(name="logits_kd", weight=1.0))
prompt = dict(system="")
extract = dict(logits=32)
traces = dict(path="runs/logits_kd/traces")
