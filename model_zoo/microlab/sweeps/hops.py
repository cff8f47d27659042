"""When do latents pay? Questions of one to three hops, a student of 3 layers (hops_6.py, hops_9.py: deeper ones).

python tools/sweep.py model_zoo/microlab/sweeps/hops.py --only naive_sft feedback_steps_gaze --seeds 0
"""

_hops = "zoo:microlab/hops/"

name = "hops_3"
title = "Micro-lab, questions of one to three hops: a student of 3 layers"
out = "runs/study/hops_3"
seeds = [0, 1, 2]  # some arms and the controls: one or two
overrides = {"train.batch_size": 8, "train.checkpoint_every": 0, "train.tensorboard": False}
per_seed = {"student.path": "runs/hops/students/3-{seed}"}
reference = "naive_sft"
arms = dict(
    base=dict(model="runs/hops/students/3-{seed}", label="before training"),
    naive_sft=dict(recipe=f"{_hops}naive_sft.py", label="Naive SFT"),
    naive_sft_long=dict(recipe=f"{_hops}naive_sft_long.py", seeds=[0], label="Naive SFT, 1.75 x the steps"),
    gaze=dict(recipe=f"{_hops}gaze.py", seeds=[0], label="no latents: all boxes"),
    gaze_final=dict(recipe=f"{_hops}gaze_final.py", label="no latents: last hop"),
    gaze_final_long=dict(
        recipe=f"{_hops}gaze_final_long.py", seeds=[0], label="no latents: last hop, 1.75 x the steps"
    ),
    gaze_layers=dict(recipe=f"{_hops}gaze_layers.py", label="no latents: hop by layer"),
    gaze_layers_reversed=dict(
        recipe=f"{_hops}gaze_layers_reversed.py", seeds=[0, 1], label="no latents: hop by layer, reversed"
    ),
    latents=dict(recipe=f"{_hops}latents.py", seeds=[0], label="learned latents: no gaze"),
    latents_map=dict(recipe=f"{_hops}latents_map.py", seeds=[0], label="learned latents: one map"),
    latents_steps=dict(recipe=f"{_hops}latents_steps.py", seeds=[0, 1], label="learned latents: per step"),
    latents_by_layer=dict(recipe=f"{_hops}latents_by_layer.py", label="learned latents: per step and layer"),
    latents_by_layer_gaze=dict(
        recipe=f"{_hops}latents_by_layer_gaze.py", seeds=[0], label="learned latents: per step and layer + answer gaze"
    ),
    latents_by_layer_newline=dict(
        recipe=f"{_hops}latents_by_layer_newline.py",
        seeds=[0],
        label="learned latents: per step and layer, other first rows",
    ),
    latents_by_layer_reversed=dict(
        recipe=f"{_hops}latents_by_layer_reversed.py", seeds=[0], label="learned latents: per step and layer, reversed"
    ),
    latents_by_layer_shuffled=dict(
        recipe=f"{_hops}latents_by_layer_shuffled.py", seeds=[0], label="learned latents: per step and layer, shuffled"
    ),
    feedback=dict(recipe=f"{_hops}feedback.py", seeds=[0], label="fed-back latents: no gaze"),
    feedback_map=dict(recipe=f"{_hops}feedback_map.py", seeds=[0, 1], label="fed-back latents: one map"),
    feedback_steps=dict(recipe=f"{_hops}feedback_steps.py", seeds=[0, 1], label="fed-back latents: per step"),
    feedback_gaze=dict(recipe=f"{_hops}feedback_gaze.py", label="fed-back latents: answer gaze alone"),
    feedback_steps_gaze=dict(recipe=f"{_hops}feedback_steps_gaze.py", label="fed-back latents: per step + answer gaze"),
    feedback_steps_reversed=dict(
        recipe=f"{_hops}feedback_steps_reversed.py",
        seeds=[0, 1],
        label="fed-back latents: per step, reversed, + answer gaze",
    ),
    feedback_steps_shuffled=dict(
        recipe=f"{_hops}feedback_steps_shuffled.py",
        seeds=[0, 1],
        label="fed-back latents: per step, shuffled, + answer gaze",
    ),
)
before = [
    [
        dict(
            run="laavit microlab runs/hops/data --kinds hops --train 3000 --val 200 --test 500",
            creates="runs/hops/data/dataset.json",
        ),
        dict(
            run="python -m laavit.microlab.pretrain zoo:microlab/hops/student_3.py --seed {seed} "
            "--out runs/hops/students/3-{seed}",
            creates="runs/hops/students/3-{seed}/hashes.json",
        ),
    ],
]
evaluate = dict(
    tasks=["microlab_test"],
    data_root="runs/hops/data/eval",
    batch_size=64,
    latents=["on", "off"],
)
