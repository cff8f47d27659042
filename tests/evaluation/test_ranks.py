"""Several processes answer what one answers, and leave one set of records."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from laavit.commands.evaluate import model_folder
from laavit.evaluation.records import read_records
from laavit.latents import latent_tokens
from laavit.registry import UserError


@pytest.fixture
def emitting(export: Path, tmp_path: Path) -> Path:
    """Of a model that writes its latents itself it is counted how many it wrote."""
    folder = shutil.copytree(export, tmp_path / "emitting")
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("".join(latent_tokens(4)), ""))
    card = json.loads((folder / "laavit.json").read_text())
    (folder / "laavit.json").write_text(json.dumps(card | {"layout": {"most": 4, "emitted": True}}))
    return folder


def run(launcher: list[str], model: Path, data: Path, out: Path, limit: int = 7) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *launcher, "-m", "laavit.cli", "eval", str(model), "--tasks", "microlab_test"]
    words += ["microlab_val", "--data-root", str(data), "--batch-size", "2", "--limit", str(limit), "--out", str(out)]
    # a cache of its own: nothing is fetched, and no other test's data set is taken for this one
    environment = os.environ | {"LMMS_EVAL_DATASETS_CACHE": str(out.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1500)


def records(out: Path) -> list[dict[str, Any]]:
    found = read_records(out / "records.jsonl")
    assert all(record.pop("seconds") > 0 for record in found)
    return found


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"],
        pytest.param(
            ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "29618"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_ranks_leave_the_records_of_one(
    launcher: list[str], emitting: Path, microlab_data: Path, tmp_path: Path
) -> None:
    """Of 7 and 6 questions one rank has one more, so that lmms-eval fills up the other; nothing is asked twice."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    for out, words in ((alone, []), (together, launcher)):
        done = run(words, emitting, microlab_data, out)
        assert done.returncode == 0, done.stderr[-3000:]
        assert sorted(file.name for file in out.iterdir()) == ["records.jsonl", "summary.json"]
    one, two = (json.loads((out / "summary.json").read_text()) for out in (alone, together))
    assert one["tasks"] == two["tasks"] and one["tasks"]["microlab_test"]["latents_written"]["without"] == 7
    assert records(alone) == records(together) and len(records(alone)) == 13
    assert all(record["latents_written"] == 0 for record in records(together))


def test_several_processes_do_not_export_a_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="is a run, which several processes would export at once; give its export"):
        model_folder(str(tmp_path))
