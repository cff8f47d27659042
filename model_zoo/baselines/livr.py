"""LIVR (arXiv 2512.21218): 16 latents, two stages (answer and question cannot see the image, then open), no targets."""

_base_ = ["../lavit/naive_sft.py"]

latents = dict(name="learned", count=16)
gate = dict(name="livr", warmup=0.4)
