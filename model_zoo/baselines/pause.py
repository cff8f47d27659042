"""Pause tokens (arXiv 2310.02226): ten learned tokens before the answer and no loss on them.

Theirs are copies of one token, these are ten of their own.
"""

_base_ = ["../lavit/naive_sft.py"]

latents = dict(name="learned", count=10)
