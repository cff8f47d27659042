"""The benchmark runs from end to end; its figures are only meant at full size on a quiet machine."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from laavit.attention import AttentionContext, laavit_attention
from laavit.structures import Tile, Trace
from laavit.traces.store import TraceWriter

ROOT = Path(__file__).resolve().parents[1]


def bench(*words: str, script: str = "attention.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "bench" / script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


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
    assert bench("--tokens", "9", "3", script="extract.py").returncode == 2
    assert bench("--kept", "0", script="extract.py").returncode == 2
    assert bench("--ways", "lavit", script="training.py").returncode == 2
    assert bench("--batch", "0", script="evaluation.py").returncode == 2
    assert bench("--megabytes", "3", script="checkpoint.py").returncode == 2
    assert bench("--ways", "padded", script="train.py").returncode == 2
    assert bench("--rows", "0", script="loss.py").returncode == 2


def test_a_loss_part_by_part_is_compared_with_all_logits(tmp_path: Path) -> None:
    """The script stops if a way gives another loss or gradient."""
    out = tmp_path / "loss.json"
    words = ["--tokens", "256", "--vocabulary", "16384", "--width", "32", "--rows", "16", "--repeats", "1"]
    done = bench(*words, "--out", str(out), script="loss.py")
    assert done.returncode == 0, done.stderr
    stock, whole, parts = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [stock["way"], whole["way"], parts["way"]] == ["every position", "all at once", "16"]
    assert whole["figure"] == pytest.approx(stock["figure"], rel=1e-4) and whole["memory_ratio"] == 1
    assert stock["memory_ratio"] > 1.5 and parts["memory_ratio"] < 0.5
    assert "| of 16 rows |" in done.stdout


def test_a_small_extraction_is_compared_with_the_straightforward_one(tmp_path: Path) -> None:
    """Both ways answer, look and understand alike (the script stops if they do not), and every measure is there."""
    out = tmp_path / "extract.json"
    done = bench("--quick", "--parts", "runs", "stores", "--out", str(out), script="extract.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["about"]["samples"] == 5 and found["about"]["shape"] == [30, 64]
    kinds = [row["kind"] for row in found["rows"]]
    assert kinds == ["throughput", "throughput"] + ["bytes", "loading"] * 3
    rows = {row["what"]: row for row in found["rows"]}
    made = rows["bytes a sample, 30 tokens of 64, 8 rows"]
    assert made["straightforward"] > 30 * 64 * 2 and made["factor"] == made["straightforward"] / made["ours"] > 1
    assert rows["bytes a sample, 30 tokens of 64, one vector"]["ours"] < made["ours"]
    assert all(row["ours"] > 0 and row["straightforward"] > 0 for row in found["rows"])
    assert "| measure | ours | straightforward | factor | wanted |" in done.stdout


def test_an_extraction_that_differs_stops_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
    module = importlib.import_module("extract")
    tile = Tile(1, 12)
    gaze, states = torch.rand(12), torch.randn(12, 4)
    top = module.TOP_K
    kept = gaze.topk(top).indices
    scaled = (gaze - gaze.min()) / (gaze.max() - gaze.min() + 1e-8)
    pooled = (scaled[kept] / scaled[kept].sum()) @ states[kept]
    with TraceWriter(tmp_path / "ours-0", {"gaze_top_k": top, "semantics_dtype": "float16"}, 4) as writer:
        writer.extend([Trace("a", "yes", (tile,), gaze, pooled, 0.5)])
    plain = tmp_path / "straightforward-0"
    plain.mkdir()

    def stored(answer: str, scores: torch.Tensor, features: torch.Tensor) -> None:
        module.write_pair(plain / "a", features, scores)
        results = [{"question_id": "a", "question": "?", "teacher_full_response": answer}]
        (plain / "results.json").write_text(json.dumps({"results": results}))

    stored("yes", gaze, states)
    assert module.same(tmp_path) == 1
    stored("no", gaze, states)
    with pytest.raises(RuntimeError, match="'yes' and 'no'"):
        module.same(tmp_path)
    stored("yes", 1 - gaze, states)
    with pytest.raises(RuntimeError, match="other tokens are looked at"):
        module.same(tmp_path)
    stored("yes", gaze, states * 1.1)
    with pytest.raises(AssertionError):
        module.same(tmp_path)


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


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "gemma3"])
def test_every_way_to_train_takes_steps(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples, K = 4 latents more, a loss that the targets add to; AdamW moves it."""
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
    module = importlib.import_module("training")
    options = SimpleNamespace(device="cpu", dtype="float32", tokens=64, batch=2)
    losses = {}
    for way in module.WAYS:
        step = module.make_step(way, family, options)
        losses[way] = [step() for _ in range(3)]
        assert losses[way][2] < losses[way][0]
    assert losses["lavit"][0] > losses["sft"][0] + 0.3


def test_the_table_of_training_says_whether_the_bound_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
    module = importlib.import_module("training")
    row = {"family": "f", "way": "lavit", "seconds": 1.0, "bytes": 2**20, "time_ratio": 1.1, "memory_ratio": 1.0}
    assert "| f | lavit | 1000 ms | 1 MiB | 1.10 | 1.00 | ≤ 1.10, ≤ 1.10: met |" in module.table([row])
    assert "missed" in module.table([row | {"memory_ratio": 1.11}])


def test_every_way_to_train_a_step_gives_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' loop on eager maps, padded batches, and shared, packed ones; without alignment it is less."""
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
    module = importlib.import_module("train")
    options = SimpleNamespace(device="cpu", tokens=[16, 36, 4], layers=2, heads=4)
    first = {way: module.make_step(way, options)() for way in module.WAYS}
    plain = first.pop("best, no alignment")
    assert plain < first["best"] - 0.3
    for loss in first.values():
        assert loss == pytest.approx(first["best"], rel=1e-5)


def test_the_table_of_samples_a_second_says_what_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
    module = importlib.import_module("train")
    row = {"samples_a_second": 2.0, "bytes": 2**20, "memory_ratio": 1.0}
    authors, padded = (row | {"way": way, "time_ratio": 3.0} for way in ("authors", "padded"))
    found = module.table([authors, padded, row | {"way": "best, no alignment", "time_ratio": 0.95}])
    assert "| authors | 2.00 | 3.00 × | 1 MiB | 1.00 | ≥ 4: missed |" in found
    assert "≥ 1.5: met" in found and "alignment on / off 1.05, ≤ 1.10: met" in found
    monkeypatch.setattr(module, "GROWTH", (64, 128, 512))
    assert "met" in module.growth_table("cpu")[0]
    monkeypatch.setattr(
        module, "alignment_work", lambda tokens, device: {"tokens": tokens, "flops": tokens**1.5, "bytes": tokens}
    )
    assert "1.50, ≤ 1.1: missed" in module.growth_table("cpu")[0]
    losses = {"authors": 1.0, "best": 1.001}
    figures = {"seconds": 2.0, "time_ratio": 1.0, "bytes": 1, "memory_ratio": 1.0}
    monkeypatch.setattr(
        module, "compared", lambda ways, *more: {way: figures | {"figure": losses[way]} for way in ways}
    )
    with pytest.raises(RuntimeError, match="not the same work"):
        module.compare(SimpleNamespace(ways=list(losses), tokens=[4], repeats=1))


def test_the_bridge_and_one_by_one_answer_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same stored questions; repeats begin with empty caches, and another answer would stop the comparison."""
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
    module = importlib.import_module("evaluation")
    options = SimpleNamespace(
        folder=tmp_path, device="cpu", batch=3, large=24, repeats=1, samples=5, answer=3, tokens=[4, 24]
    )
    vars(options).update(width=32, layers=2, heads=4)
    module.write_teacher(tmp_path / "teacher", options)
    module.write_samples(tmp_path, "mixed", module.mixed_grids(5, 4, 24))
    rows = module.documents(tmp_path, 5, 2)
    assert [row["image"].size for row in rows][:2] == [rows[0]["image"].size] * 2  # two questions an image
    ours, plain = module.bridge(rows, options), module.one_by_one(rows, options)
    assert ours() == plain() == ours() and len(set(plain())) > 1

    def compared(ways: list[str], *more: object) -> dict[str, dict[str, object]]:
        figures = {"seconds": 2.0, "bytes": 2**20, "times": [2.0], "memory_ratio": 1.0}
        return {way: {**figures, "figure": list(said[way]), "time_ratio": ratio[way]} for way in ways}

    said = {"bridge": ["a", "b"], "one by one": ["a", "b"]}
    ratio = {"bridge": 0.25, "one by one": 1.0}
    monkeypatch.setattr(module, "compared", compared)
    found = module.table(module.compare(1, options))
    assert "| 1 | bridge | 2.5 | 4.0 | 1 MiB | ≥ 3: met |" in found
    ratio["bridge"] = 0.4
    assert "≥ 3: missed" in module.table(module.compare(1, options))
    said["bridge"] = ["a", "c"]
    with pytest.raises(RuntimeError, match="question 1: 'c' and 'b'"):
        module.compare(1, options)
