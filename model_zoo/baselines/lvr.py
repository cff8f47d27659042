"""LVR (arXiv 2509.24251): hidden states fed back, each led to a patch inside the boxes (MSE); no gate, no teacher loss.

Theirs has as many latents as the boxes have patches; here 8 stand for patches spread over them.
"""

_base_ = ["../lavit/naive_sft.py"]

latents = dict(name="feedback", count=8)
targets = dict(region=dict(name="region", weight=0.1))
