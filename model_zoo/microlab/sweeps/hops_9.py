"""When do latents pay? As hops.py, with a student of 9 layers."""

_base_ = ["./hops.py"]

name = "hops_9"
title = "Micro-lab, questions of one to three hops: a student of 9 layers"
out = "runs/hops/sweep_9"
per_seed = {"student.path": "runs/hops/students/9-{seed}"}
arms = dict(base=dict(model="runs/hops/students/9-{seed}"))
before = [
    [
        dict(
            run="laavit microlab runs/hops/data --kinds hops --train 3000 --val 200 --test 500",
            creates="runs/hops/data/dataset.json",
        ),
        dict(
            run="python -m laavit.microlab.pretrain zoo:microlab/hops/student_9.py --seed {seed} "
            "--out runs/hops/students/9-{seed}",
            creates="runs/hops/students/9-{seed}/hashes.json",
        ),
    ],
]
