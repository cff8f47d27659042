"""Micro-lab, control: latents and gate without any alignment."""

_base_ = ["./lavit.py"]

targets = dict(concept=None, trajectory=None)
