"""Hops, four fed-back latents, each follows its own hop, and the answer the last one."""

_base_ = ["./feedback_steps.py"]

targets = dict(answer=dict(name="box_final", rows=("answer",), reduction="mean", weight=1.0, layers=(-2, -1)))
