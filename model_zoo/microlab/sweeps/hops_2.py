"""When do latents pay? As hops.py, with a student of 2 layers: fewer than the longest question has hops, so that it
cannot look at one hop after another layer by layer, but could latent by latent.
"""

_base_ = ["./hops.py"]

name = "hops_2"
title = "Micro-lab, questions of one to three hops: a student of 2 layers"
out = "runs/study/hops_2"
seeds = [0, 1, 2]
per_seed = {"student.path": "runs/hops/students/2-{seed}"}
arms = dict(
    _delete_=True,
    base=dict(model="runs/hops/students/2-{seed}", label="before training"),
    naive_sft=dict(recipe="zoo:microlab/hops/naive_sft.py", label="Naive SFT"),
    gaze_final=dict(recipe="zoo:microlab/hops/gaze_final.py", label="no latents: last hop"),
    gaze_final_long=dict(recipe="zoo:microlab/hops/gaze_final_long.py", label="no latents: last hop, 1.75 x the steps"),
    gaze_layers=dict(recipe="zoo:microlab/hops/gaze_layers.py", label="no latents: hop by layer"),
    feedback_gaze=dict(recipe="zoo:microlab/hops/feedback_gaze.py", label="fed-back latents: answer gaze alone"),
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
            run="python -m laavit.microlab.pretrain zoo:microlab/hops/student_2.py --seed {seed} "
            "--out runs/hops/students/2-{seed}",
            creates="runs/hops/students/2-{seed}/hashes.json",
        ),
    ],
]
