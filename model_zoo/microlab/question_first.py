"""Micro-lab, control: semantics of a teacher that reads the question before the image, from a store of their own."""

_base_ = ["./lavit.py"]

targets = dict(concept=dict(store="runs/question_first/traces"))
