"""Control: the annotated boxes in place of the teacher's gaze (semantics as they are)."""

_base_ = ["../lavit/lavit.py"]

targets = dict(trajectory=dict(_delete_=True, name="box"))
