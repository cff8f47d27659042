"""Naive SFT of Qwen2.5-VL-3B, settings of Table A1: the answers alone, on the samples that LaViT learns from."""

student = dict(name="qwen2_5_vl_3b", min_pixels=200_704, max_pixels=1_003_520)  # 256 to 1,280 image tokens
data = dict(
    name="visual_cot", annotations="data/visual_cot/viscot_363k.json", root="data/visual_cot/images", split="train"
)
prompt = dict(system="")
traces = dict(path="runs/lavit/traces", select=("correctness", "alignment"))  # select=() trains on all of Visual-CoT
train = dict(
    steps=1000,
    batch_size=16,
    lr=5e-6,
    betas=(0.9, 0.999),
    schedule="linear",
    warmup_ratio=0.03,
    weight_decay=0.0,
    precision="bf16",
    gradient_checkpointing=True,
)
