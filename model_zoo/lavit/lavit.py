"""LaViT-3B (arXiv 2601.10129): four latents, the cosine gate, semantics and gaze of Qwen2.5-VL-32B."""

_base_ = ["./naive_sft.py"]

teacher = dict(name="qwen2_5_vl_32b", min_pixels=200_704, max_pixels=1_003_520)
latents = dict(name="learned", count=4)
gate = dict(name="cosine", warmup=400)
targets = dict(
    concept=dict(name="concept", weight=0.3),
    trajectory=dict(name="trajectory", weight=0.3, top_k=8),
)
filters = dict(correctness="correctness", alignment="alignment")
prompt = dict(_delete_=True)  # the system prompt of App. C.3, in our words
