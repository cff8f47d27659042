"""The hops' student of 2 layers: fewer than the longest question has hops."""

_base_ = ["./student_3.py"]

name = "hops/student_2"
sizes = dict(text_layers=2)
