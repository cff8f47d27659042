"""When do latents pay? As hops.py, with a student of 6 layers."""

_base_ = ["./hops.py"]

name = "hops_6"
title = "Micro-lab, questions of one to three hops: a student of 6 layers"
out = "runs/study/hops_6"
seeds = [0, 1]  # some arms: one
per_seed = {"student.path": "runs/hops/students/6-{seed}"}
arms = dict(
    _delete_=True,
    base=dict(model="runs/hops/students/6-{seed}", label="before training"),
    naive_sft=dict(recipe="zoo:microlab/hops/naive_sft.py", label="Naive SFT"),
    gaze_final=dict(recipe="zoo:microlab/hops/gaze_final.py", seeds=[0], label="no latents: last hop"),
    gaze_layers=dict(recipe="zoo:microlab/hops/gaze_layers.py", label="no latents: hop by layer"),
    latents_steps=dict(recipe="zoo:microlab/hops/latents_steps.py", seeds=[0], label="learned latents: per step"),
    latents_by_layer=dict(recipe="zoo:microlab/hops/latents_by_layer.py", label="learned latents: per step and layer"),
    feedback_gaze=dict(
        recipe="zoo:microlab/hops/feedback_gaze.py", seeds=[0], label="fed-back latents: answer gaze alone"
    ),
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
            run="python -m laavit.microlab.pretrain zoo:microlab/hops/student_6.py --seed {seed} "
            "--out runs/hops/students/6-{seed}",
            creates="runs/hops/students/6-{seed}/hashes.json",
        ),
    ],
]
