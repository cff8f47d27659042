"""Control: latents and gate without any alignment."""

_base_ = ["../lavit/lavit.py"]

targets = dict(concept=None, trajectory=None)
