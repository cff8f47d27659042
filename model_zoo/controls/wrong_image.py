"""Control: semantics and gaze of another image."""

_base_ = ["../lavit/lavit.py"]

targets = dict(concept=dict(control="wrong_image"), trajectory=dict(control="wrong_image"))
