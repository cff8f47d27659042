"""The benchmark runs from end to end; its figures are only meant at full size on a quiet machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from laavit.attention import AttentionContext, laavit_attention

ROOT = Path(__file__).resolve().parents[1]


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "bench" / "attention.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_small_comparison_prints_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = bench("--tokens", "64", "--repeats", "1", "--works", "training", "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [row["way"] for row in found["rows"]] == ["ours", "plain", "eager"]
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in found["rows"])
    ours, plain, eager = found["rows"]
    assert abs(ours["figure"] - eager["figure"]) <= 1e-4 * abs(eager["figure"]), "both do the same work"
    assert plain["time_ratio"] == 1.0 and ours["figure"] != plain["figure"]
    assert "| training | 64 | ours |" in done.stdout and "wanted" in done.stdout


def test_wrong_flags_exit_2() -> None:
    assert bench("--repeats", "0").returncode == 2
    assert bench("--works", "serving").returncode == 2


def test_merged_rows_are_the_mean_over_layers_without_keeping_each() -> None:
    torch.manual_seed(0)
    shapes = [(1, 4, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8)]
    merged, kept = (AttentionContext(rows=torch.tensor([[5, 8]]), merged=choice) for choice in (True, False))
    for layer in range(3):
        module = nn.Module()
        module.layer_idx, module.num_key_value_groups, module.is_causal = layer, 2, True
        inputs = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
        for context in (merged, kept, merged):  # a layer that runs again under checkpointing counts once
            laavit_attention(module, *inputs, None, scaling=8**-0.5, laavit=context)
    assert merged.recorded == {} and len(kept.recorded) == 3
    torch.testing.assert_close(merged.mean_rows(), kept.mean_rows(), rtol=1e-12, atol=1e-14)
