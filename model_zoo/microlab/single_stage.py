"""Micro-lab, "single stage": the gate is open throughout."""

_base_ = ["./lavit.py"]

gate = dict(_delete_=True, name="open")
