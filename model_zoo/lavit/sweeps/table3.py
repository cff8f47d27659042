"""LaViT-3B, Table 3 (arXiv 2601.10129): the ablations, on the benchmarks of the paper.

    laavit sweep zoo:lavit/sweeps/table3.py --executor torchrun            # all GPUs of this machine, run after run
    laavit sweep zoo:lavit/sweeps/table3.py --executor slurm               # a job array

"w/o latent tokens" is the trained LaViT with its latents masked at inference. The base is the paper's baseline.
"""

name = "lavit_table3"
title = "LaViT, Table 3: ablations"
reference = "lavit"
seeds = [0]  # the paper has one run of each; three or more separate an effect from a seed
evaluate = dict(
    tasks=[
        "mmvp",
        "blink_relative_depth",
        "blink_iq_test",
        "blink_relative_reflectance",
        "blink_spatial_relation",
    ],
    batch_size=16,
)
arms = dict(
    base=dict(model="Qwen/Qwen2.5-VL-3B-Instruct", label="Qwen2.5-VL-3B"),
    naive_sft=dict(recipe="../naive_sft.py", label="Naive SFT"),
    lavit=dict(recipe="../lavit.py", label="LaViT-3B", latents=["on", "off"]),
    no_trajectory=dict(recipe="../no_trajectory.py", label="w/o trajectory alignment"),
    no_concept=dict(recipe="../no_concept.py", label="w/o semantic reconstruction"),
    hard_gate=dict(recipe="../hard_gate.py", label="w/o curriculum gating (hard switch)"),
    single_stage=dict(recipe="../single_stage.py", label="single stage"),
)
before = ["laavit extract zoo:lavit/lavit.py"]
slurm = {"nodes": 1, "gres": "gpu:4", "cpus-per-task": 32, "time": "08:00:00"}
