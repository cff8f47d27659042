"""Hops, Naive SFT: the answers alone. Every other recipe here differs from this one by its own lines.

Students of 6 and 9 layers: --student.path runs/hops/students/6-0 and runs/hops/students/9-0.
"""

student = dict(name="microlab", path="runs/hops/students/3-0")
data = dict(name="visual_cot", annotations="runs/hops/data/train.json", root="runs/hops/data/images")
prompt = dict(system="")
traces = dict(vision_cache="runs/hops/vision", keep=True)
train = dict(
    steps=800,
    batch_size=16,  # images: all questions of an image stand in one batch
    grouped=True,
    shared_prefix=True,
    lr=2e-3,
    betas=(0.9, 0.98),
    warmup_ratio=0.05,
    checkpoint_every=800,
    log_every=20,
)
