"""Pause tokens (arXiv 2310.02226): ten tokens before the answer and no loss on them.

Theirs are one token ten times; these start as one and are free to part.
"""

_base_ = ["../lavit/naive_sft.py"]

latents = dict(name="learned_token", count=10)
