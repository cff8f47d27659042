"""Hops, control: fed-back latents and answer gaze, the latents' hops from the last to the first."""

_base_ = ["./feedback_steps_gaze.py"]

targets = dict(latents=dict(order="reversed"))
