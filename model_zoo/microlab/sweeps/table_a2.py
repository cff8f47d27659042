"""Micro-lab: Table A2 of LaViT (arXiv 2601.10129) on the CPU, the number of latents by the length of the training.

K ∈ {4, 6, 8} as there; of its steps {600, …, 1400} the same shares of the micro-lab's 400 steps. The gate's warm-up
stays where it is, as in the paper.
"""

name = "microlab_table_a2"
title = "The micro-lab's Table A2: latents by steps"
base = "../lavit.py"
out = "runs/study/table_a2"
grid = {"latents.count": [4, 6, 8], "train.steps": [240, 320, 400, 480, 560]}
seeds = [0, 1, 2]
reference = "count=4+steps=400"
per_seed = {"student.path": "runs/study/students/{seed}"}
overrides = {
    "train.batch_size": 8,
    "train.shared_prefix": True,
    "train.checkpoint_every": 0,
    "train.tensorboard": False,
}
evaluate = dict(tasks=["microlab_test"], data_root="runs/demo/data/eval", batch_size=64)
before = [
    "laavit microlab runs/demo/data",
    dict(
        run="python -m laavit.microlab.pretrain zoo:microlab/student.py --seed {seed} --tower zoo:microlab/student"
        " --out runs/study/students/{seed}",
        creates="runs/study/students/{seed}/hashes.json",
    ),
    "laavit extract zoo:microlab/lavit.py",
]
