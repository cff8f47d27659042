"""The benchmark runs from end to end; its figures are only meant at full size on a quiet machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
