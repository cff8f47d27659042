"""The hops' student of 9 layers."""

_base_ = ["./student_3.py"]

name = "hops/student_9"
sizes = dict(text_layers=9)
