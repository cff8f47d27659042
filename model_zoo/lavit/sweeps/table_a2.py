"""LaViT-3B, Table A2 (arXiv 2601.10129): K ∈ {4, 6, 8} latents by 600 to 1400 steps, on the benchmarks of the paper."""

name = "lavit_table_a2"
title = "LaViT, Table A2: latents by steps"
base = "../lavit.py"
grid = {"latents.count": [4, 6, 8], "train.steps": [600, 800, 1000, 1200, 1400]}
seeds = [0]
reference = "count=4+steps=1000"
evaluate = dict(
    tasks=["mmvp", "blink_iq_test", "blink_relative_reflectance", "blink_spatial_relation"],
    batch_size=16,
)
before = ["laavit extract zoo:lavit/lavit.py"]
slurm = {"nodes": 1, "gres": "gpu:4", "cpus-per-task": 32, "time": "08:00:00"}
