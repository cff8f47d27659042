"""The hops' student of 6 layers."""

_base_ = ["./student_3.py"]

name = "hops/student_6"
sizes = dict(text_layers=6)
