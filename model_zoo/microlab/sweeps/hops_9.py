"""When do latents pay? As hops.py, with a student of 9 layers."""

_base_ = ["./hops.py"]

name = "hops_9"
title = "Micro-lab, questions of one to three hops: a student of 9 layers"
out = "runs/study/hops_9"
seeds = [0]
per_seed = {"student.path": "runs/hops/students/9-{seed}"}
arms = dict(
    _delete_=True,
    base=dict(model="runs/hops/students/9-{seed}", label="before training"),
    naive_sft=dict(recipe="zoo:microlab/hops/naive_sft.py", label="Naive SFT"),
    gaze_layers=dict(recipe="zoo:microlab/hops/gaze_layers.py", label="no latents: hop by layer"),
    latents_by_layer=dict(recipe="zoo:microlab/hops/latents_by_layer.py", label="learned latents: per step and layer"),
    feedback_steps_gaze=dict(
        recipe="zoo:microlab/hops/feedback_steps_gaze.py", label="fed-back latents: per step + answer gaze"
    ),
)
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
