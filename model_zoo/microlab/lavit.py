"""Micro-lab, LaViT: four latents, the cosine gate, concept and trajectory targets from the grounded tiny teacher."""

_base_ = ["./naive_sft.py"]

teacher = "microlab"
latents = dict(name="learned", count=4)
gate = dict(name="cosine", warmup=160)
targets = dict(
    concept=dict(name="concept", weight=1.0),
    trajectory=dict(name="trajectory", weight=1.0, top_k=8, layers=(-2, -1)),
)
filters = dict(correctness="correctness", alignment="alignment")
extract = dict(rows=("header", "answer"), layers=(-2, -1), max_new_tokens=4, batch_size=96, shard_size=1152, passes=2)
traces = dict(path="runs/demo/traces")
