"""The tiny LaViT with sharded checkpoints in the background: the same run, resumed and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from laavit.cli import run
from laavit.commands.export import export_run
from laavit.engine.checkpoint import is_sharded, read_state

EVERY = ["--train.checkpoint_every", "1", "--train.keep_last", "0"]
SHARDED = [*EVERY, "--train.checkpoint_format", "sharded", "--train.checkpoint_async", "true"]
ADAPTERS = ["--student.lora.rank", "4", "--train.lr", "0.02"]
WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "heads.safetensors", "optimizer.safetensors")


def weights(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in WEIGHTS if (folder / name).is_file()}


@pytest.mark.parametrize("words", [[], ADAPTERS], ids=["whole", "adapters"])
def test_a_sharded_run_equals_a_plain_one(project: Path, tmp_path: Path, words: list[str]) -> None:
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    assert run("train", [str(project), *words, *EVERY, "--work-dir", str(plain)]) == 0
    assert run("train", [str(project), *words, *SHARDED, "--work-dir", str(cut)]) == 0
    second, last = (cut / "checkpoints" / f"iter_00000{step}" for step in (2, 3))
    whole = plain / "checkpoints" / last.name
    assert weights(last) == weights(whole) and len(weights(last)) == 3
    assert is_sharded(second) and (second / "chat_template.jinja").is_file() and (second / "config.json").is_file()
    assert read_state(second)["recipe"] == json.loads((cut / "recipe.json").read_text())

    shutil.rmtree(last)
    (cut / "checkpoints" / "best").symlink_to(second.name)
    ours = export_run(cut, tmp_path / "ours", checkpoint=cut / "checkpoints" / "best")
    theirs = export_run(plain, tmp_path / "theirs", checkpoint=plain / "checkpoints" / second.name)
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert json.loads((ours / "laavit.json").read_text())["step"] == "iter_000002"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "ours", "plain", "theirs"]

    assert run("train", [str(project), *words, *SHARDED, "--work-dir", str(cut), "--resume"]) == 0
    assert weights(last) == weights(whole)
