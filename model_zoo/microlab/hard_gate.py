"""Micro-lab, "w/o curriculum gating": closed for 160 steps, then open at once."""

_base_ = ["./lavit.py"]

gate = dict(_delete_=True, name="hard", warmup=160)
