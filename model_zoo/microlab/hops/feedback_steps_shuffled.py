"""Hops, control: fed-back latents and answer gaze, the latents' hops in an order of each sample's own."""

_base_ = ["./feedback_steps_gaze.py"]

targets = dict(latents=dict(order="shuffled"))
