"""Naive SFT with LoRA in place of full fine-tuning."""

_base_ = ["../lavit/naive_sft.py"]

student = dict(name="qwen2_5_vl_3b_lora")
train = dict(lr=1e-4)
