"""Micro-lab, Naive SFT: the answers alone. Every other micro-lab recipe differs from this one by its own lines."""

student = "microlab"
data = dict(name="visual_cot", annotations="runs/demo/data/train.json", root="runs/demo/data/images")
prompt = dict(system="")
traces = dict(vision_cache="runs/demo/vision", keep=True)
train = dict(
    steps=400,
    batch_size=16,  # images: all questions of an image stand in one batch
    grouped=True,
    lr=2e-3,
    betas=(0.9, 0.98),
    warmup_ratio=0.05,
    checkpoint_every=100,
    log_every=20,
)
