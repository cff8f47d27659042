"""Micro-lab, control: a teacher of the same size that was never led to the boxes (teacher_ungrounded.py makes it)."""

_base_ = ["./lavit.py"]

teacher = dict(_delete_=True, name="hf", path="runs/ungrounded/teacher")
traces = dict(path="runs/ungrounded/traces")
