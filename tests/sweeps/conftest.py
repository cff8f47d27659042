"""Two tiny recipes of the micro-lab (no traces needed), its questions, and a sweep over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from laavit.microlab.dataset import DatasetSettings, write_dataset
from laavit.microlab.tiny import Sizes, build_model, build_processor, build_tokenizer

NAIVE = """
student = dict(name="hf", path={student!r})
data = dict(name="visual_cot", annotations={data!r} + "/train.json", root={data!r} + "/images")
prompt = dict(system="")
train = dict(
    steps=3, batch_size=2, grouped=True, lr=2e-3, checkpoint_every=1, log_every=1, tensorboard=False, device="cpu"
)
"""
LATENTS = """
_base_ = ["./naive.py"]
latents = dict(name="learned", count=2)
gate = dict(name="cosine", warmup=2)
targets = dict(look=dict(name="box", weight=1.0))
"""
SWEEP = """
_data = {data!r}
name = "tiny"
title = "A tiny sweep"
base = "naive.py"
arms = dict(
    start=dict(model={student!r}),
    naive=None,
    latents=dict(recipe="latents.py", latents=["on", "off"]),
)
seeds = [0, 1]
reference = "naive"
evaluate = dict(tasks=["microlab_test"], data_root=_data + "/eval", batch_size=8)
"""


@pytest.fixture(scope="session")
def lab_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """naive.py, latents.py, sweep.py and what they read."""
    folder = tmp_path_factory.mktemp("sweeps")
    write_dataset(folder / "data", DatasetSettings(train=4, val=1, test=2))
    tokenizer = build_tokenizer(scenes=40)
    build_model(Sizes(24, 2, 2, 24, 1, 2, 2), tokenizer, 0).save_pretrained(folder / "student")
    build_processor(tokenizer).save_pretrained(folder / "student")
    places = {"student": str(folder / "student"), "data": str(folder / "data")}
    for name, text in (("naive", NAIVE), ("sweep", SWEEP)):
        (folder / f"{name}.py").write_text(text.format(**places))
    (folder / "latents.py").write_text(LATENTS)
    return folder
