"""Table A2, K = 6 (its other columns: --train.steps 600, 800, 1200 and 1400; the schedule ends where the run does)."""

_base_ = ["./lavit.py"]

latents = dict(count=6)
