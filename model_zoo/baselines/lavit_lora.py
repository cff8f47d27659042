"""LaViT-3B with LoRA in place of full fine-tuning."""

_base_ = ["../lavit/lavit.py"]

student = dict(lora=dict(rank=16, alpha=32.0))
train = dict(lr=1e-4)
