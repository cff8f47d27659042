"""Micro-lab: why does LaViT not beat gaze on the answer's own rows? The obvious causes, one changed at a time.

On the validation split, since settings are looked at here; Table 3 (table3.py) is of the test split.
"""

_base_ = ["./table3.py"]

name = "microlab_causes"
title = "The micro-lab: causes, one changed at a time"
out = "runs/study/causes"
reference = "lavit"
seeds = [0]
evaluate = dict(tasks=["microlab_val"])
arms = dict(
    _delete_=True,
    naive_sft=dict(recipe="../naive_sft.py", label="Naive SFT"),
    lavit=dict(recipe="../lavit.py", label="LaViT"),
    gaze_no_latents=dict(recipe="../gaze_no_latents.py", label="gaze on own rows, no latents"),
    own_rows=dict(recipe="../own_rows.py", label="LaViT + gaze on own rows"),
    weaker=dict(
        recipe="../lavit.py",
        overrides={"targets.concept.weight": 0.3, "targets.trajectory.weight": 0.3},
        label="LaViT, λ = 0.3",
    ),
    stronger=dict(
        recipe="../lavit.py",
        overrides={"targets.concept.weight": 3.0, "targets.trajectory.weight": 3.0},
        label="LaViT, λ = 3",
    ),
    all_layers=dict(recipe="../lavit.py", overrides={"targets.trajectory.layers": None}, label="LaViT, all layers"),
    whole_map=dict(recipe="../lavit.py", overrides={"targets.trajectory.top_k": None}, label="LaViT, the whole map"),
    one_latent=dict(recipe="../lavit.py", overrides={"latents.count": 1}, label="LaViT, K = 1"),
    eight_latents=dict(recipe="../lavit.py", overrides={"latents.count": 8}, label="LaViT, K = 8"),
    naive_long=dict(recipe="../naive_sft.py", overrides={"train.steps": 800}, label="Naive SFT, twice the steps"),
    lavit_long=dict(recipe="../lavit.py", overrides={"train.steps": 800}, label="LaViT, twice the steps"),
    gaze_long=dict(
        recipe="../gaze_no_latents.py", overrides={"train.steps": 800}, label="gaze on own rows, twice the steps"
    ),
    naive_few=dict(recipe="../naive_sft.py", overrides={"data.limit": 1800}, label="Naive SFT, 300 scenes"),
    lavit_few=dict(recipe="../lavit.py", overrides={"data.limit": 1800}, label="LaViT, 300 scenes"),
    gaze_few=dict(recipe="../gaze_no_latents.py", overrides={"data.limit": 1800}, label="gaze on own rows, 300 scenes"),
)
