"""CoVT (arXiv 2511.19418), as far as encoders go: latents rebuild frozen experts' features (DINOv2, SigLIP 2).

Their segmentation, depth and edge experts are not among the teachers. An expert's store is made with
--teacher dinov2_large --traces.path runs/covt/dinov2_large --extract.semantics mean --filters null.
"""

_base_ = ["../lavit/naive_sft.py"]

latents = dict(name="learned", count=8)
targets = dict(
    dino=dict(name="static_embeddings", anchor="mean", store="runs/covt/dinov2_large"),
    siglip=dict(name="static_embeddings", anchor="mean", store="runs/covt/siglip2_so400m"),
)
