"""Micro-lab, LIVR: 16 latents, two stages, no targets."""

_base_ = ["./naive_sft.py"]

latents = dict(name="learned", count=16)
gate = dict(name="livr", warmup=0.4)
