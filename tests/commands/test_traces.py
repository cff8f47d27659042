"""``laavit traces``: every action as a user runs it, on the project's store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from laavit.cli import run
from laavit.commands.traces import ACTIONS
from laavit.traces import shards
from laavit.traces.store import TraceStore

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """``say(words...)`` -> exit code, stdout, stderr of ``laavit traces words...``."""

    def speak(*words: object) -> tuple[int, str, str]:
        code = run("traces", [str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return speak


@pytest.fixture
def store(project: Path, tmp_path: Path) -> Path:
    """A copy of the project's store, with verdicts."""
    return Path(shutil.copytree(project.parent / "traces", tmp_path / "store"))


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_has_help_and_refuses_strange_options(
    say: Say, action: str, capsys: pytest.CaptureFixture
) -> None:
    if action not in ("judge", "calibrate"):  # those two print a recipe's keys as well, and return
        with pytest.raises(SystemExit) as ended:
            say(action, "--help")
        assert ended.value.code == 0 and "laavit traces" in capsys.readouterr().out
    else:
        assert say(action, "--help")[0] == 0
    code, _, error = say(action, "--no-such-option", "x")
    assert code == 2 and error.count("\n") == 1 and error.startswith("error: ")


def test_actions_are_listed_and_misspelled_ones_named(say: Say) -> None:
    code, out, _ = say()
    assert code == 0 and all(f"  {action} " in out for action in ACTIONS)
    code, _, error = say("verfy", "x")
    assert code == 2 and "did you mean 'verify'?" in error and error.count("\n") == 1


def test_verify(say: Say, store: Path) -> None:
    code, out, _ = say("verify", store)
    assert code == 0 and out.endswith("6 traces, all well\n")
    file = store / "shard-00001.arrow"
    file.write_bytes(file.read_bytes()[:-3])
    (store / "verdicts/alignment.arrow").write_bytes(b"x")
    code, out, _ = say("verify", store)
    assert code == 1 and "shard-00001.arrow: truncated" in out and "1 damages" in out
    code, _, error = say("verify", store.parent / "none")
    assert code == 2 and "there is no trace store at" in error


def test_verify_looks_into_the_columns(say: Say, store: Path) -> None:
    """Figures that no extraction writes, under records that fit: what a hand or a faulty disk could leave."""
    rows = shards.read_rows(store / "shard-00001.arrow")
    record = json.loads((store / "shard-00001.json").read_text())
    features = _features(store)
    broken: list[tuple[dict, str]] = [
        ({"gaze_values": -rows[0]["gaze_values"]}, "negative entries"),
        ({"semantics": rows[0]["semantics"] * np.nan}, "'semantics' that are not finite"),
        ({"gaze_values": rows[0]["gaze_values"][:-1]}, "has a map of"),
    ]
    for change, message in broken:
        changed = [{**rows[0], **change}, *rows[1:]]
        shards.write_shard(store, 1, changed, features, record["samples"])
        code, out, _ = say("verify", store)
        assert code == 1 and message in out


def _features(store: Path):
    from laavit.traces.schema import trace_features

    return trace_features(TraceStore(store).header["semantics_dtype"])


def test_verify_finds_verdicts_that_do_not_fit(say: Say, store: Path) -> None:
    opened = TraceStore(store)
    assert opened.verdicts()
    from laavit.traces.schema import VERDICT_FEATURES

    for ids, message in (([*opened.ids, "x"], "judges sample 'x', which has no trace"), (opened.ids[1:], "5 of 6")):
        rows = [{"sample_id": key, "verdict": True, "score": 1.0} for key in ids]
        (store / "verdicts/alignment.arrow").write_bytes(shards.stream_bytes(rows, VERDICT_FEATURES))
        code, out, _ = say("verify", store)
        assert code == 1 and message in out


def test_stats(say: Say, project: Path) -> None:
    store = TraceStore(project.parent / "traces")
    code, out, _ = say("stats", store.path, "--recipe", project, "--boxes")
    assert code == 0
    passed = sum(store.verdicts()["alignment"].values())
    assert f"6 traces, {store.bytes_per_sample():.0f} bytes each" in out
    alignment = next(line.split() for line in out.splitlines() if line.startswith("alignment "))
    assert alignment[1] == str(passed) and alignment[4] == str(passed)
    gqa = next(line.split() for line in out.splitlines() if line.startswith("gqa "))
    assert gqa[1:3] == ["6", str(passed)] and gqa[5:7] == ["2921", "20.05"]
    entropies = [-(p * p.log()).sum() for t in store for p in [t.gaze.double() / t.gaze.double().sum()]]
    line = next(line for line in out.splitlines() if line.startswith("entropy"))
    assert float(line.split("nats")[1].split()[1]) == pytest.approx(float(sum(entropies)) / 6, rel=1e-3)
    assert any(line.startswith("share of the map in the boxes") for line in out.splitlines())
    assert say("stats", store.path, "--boxes")[0] == 2
    assert "gqa" not in say("stats", store.path, "--fast")[1]


def test_show_draws_what_the_trace_says(say: Say, project: Path, tmp_path: Path) -> None:
    store = TraceStore(project.parent / "traces")
    code, out, _ = say("show", store.path, store.ids[0], store.ids[3], "--recipe", project, "--out", tmp_path / "png")
    assert code == 0 and "strongest tokens" in out and "What colour is the shape?" in out
    pictures = sorted((tmp_path / "png").glob("*.png"))
    assert len(pictures) == 2
    for picture in pictures:
        with Image.open(picture) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        assert min(image.size) > 300
        cyan = (abs(pixels - np.array([0, 229, 255])).sum(-1) < 40).sum()
        assert cyan > 300  # the boxes are drawn
    code, out, _ = say("show", store.path)
    assert code == 0 and ".png" not in out and store.ids[0] in out
    assert say("show", store.path, "nobody")[0] == 2


def test_judge_again_with_another_threshold(say: Say, project: Path, store: Path) -> None:
    before = TraceStore(store).scores("alignment")
    code, out, _ = say("judge", project, "--traces.path", store, "--filters.alignment.minimum", "0.9")
    assert code == 0 and "alignment" in out
    after = TraceStore(store)
    assert after.scores("alignment") == before
    assert after.verdicts()["alignment"] == {key: score >= 0.9 for key, score in before.items()}
    note = json.loads((store / "verdicts/alignment.json").read_text())["filter"]
    assert note["minimum"] == 0.9 and note["type"] == "AlignmentFilter"
    code, _, error = say("judge", project, "--traces.path", store, "--filters.difficulty", "difficulty")
    assert code == 2 and "filters.difficulty: the store holds no answers given without the image" in error
    code, _, error = say("judge", project, "--traces.path", store, "--filters.correctness", "correctness")
    assert code == 2 and "gold answers" in error
    assert say("judge", project, "--filters", "null")[0] == 2
    assert "read only" in say("judge", project, "--traces.path", "hf://datasets/a/b")[2]


def test_export_a_part(say: Say, project: Path, store: Path, tmp_path: Path) -> None:
    chosen = TraceStore(store).ids[1:4]
    (tmp_path / "ids.txt").write_text("\n".join(chosen) + "\n")
    words = ["--ids", tmp_path / "ids.txt", "--limit", 2, "--top-k", 3, "--semantics-dtype", "float16"]
    assert say("export", store, tmp_path / "part", *words)[0] == 0
    part = TraceStore(tmp_path / "part")
    assert part.ids == chosen[:2] and int((part[0].gaze > 0).sum()) == 3
    assert part.header["exported"]["limit"] == 2
    assert say("export", store, tmp_path / "gqa", "--sources", "gqa", "--recipe", project)[0] == 0
    assert len(TraceStore(tmp_path / "gqa")) == 6
    assert say("export", store, tmp_path / "rows.jsonl", "--format", "jsonl", "--limit", 1)[0] == 0
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert torch.equal(torch.tensor(row["gaze"]), TraceStore(store)[0].gaze)
    for words, message in (
        (["--sources", "gqa"], "--sources needs --recipe"),
        (["--sources", "gpa", "--recipe", project], "did you mean 'gqa'"),
        (["--select", "correct"], "no verdicts of a filter 'correct'"),
        (["--limit", 0], "--limit is at least 1"),
        (["--ids", tmp_path / "no.txt"], "cannot be read as a list of ids"),
        (["--format", "jsonl", "--top-k", 2], "of a store"),
        (["--data.root", "x"], "'--data.root' is no option"),
    ):
        code, _, error = say("export", store, tmp_path / "never", *words)
        assert code == 2 and message in error and not (tmp_path / "never").exists()


def test_merge_and_diff(say: Say, store: Path, tmp_path: Path) -> None:
    for number in range(2):
        part = tmp_path / f"part{number}"
        part.mkdir()
        shutil.copy(store / "header.json", part)
        shards.copy_shard(store, part, number)
    assert say("merge", tmp_path / "out", tmp_path / "part0")[0] == 2
    assert say("merge", tmp_path / "half", tmp_path / "part0", "--partial")[0] == 0
    assert say("merge", tmp_path / "out", tmp_path / "part0", tmp_path / "part1")[0] == 0
    code, out, _ = say("diff", store, tmp_path / "out")
    assert code == 1 and "judged differently by 'alignment': 6" in out  # parts carry no verdicts
    shutil.rmtree(tmp_path / "out/verdicts", ignore_errors=True)
    shutil.rmtree(store / "verdicts")
    code, out, _ = say("diff", store, tmp_path / "out")
    assert code == 0 and "6 of 6 common samples are equal bit for bit; the stores are equal" in out
    say("export", store, tmp_path / "less", "--limit", 4, "--top-k", 1)
    code, out, _ = say("diff", store, tmp_path / "less")
    assert code == 1 and "header: 'gaze_top_k' is None in the first and 1 in the second" in out
    assert f"only in {store}: 2" in out and "0 of 4 common samples are equal" in out


def test_card_and_dry_push(say: Say, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", refuse)
    assert say("card", store, "--name", "Six traces")[0] == 0
    assert "# Six traces" in (store / "README.md").read_text(encoding="utf-8")
    code, out, _ = say("push", store, "me/six", "--dry-run")
    assert code == 0 and "header.json" in out and "nothing was uploaded" in out and ".lock" not in out
    assert say("push", store, "six")[0] == 2


def test_push_uploads(say: Say, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, name, **options: calls.append((name, options))
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **options: calls.append(options))
    say("card", store)
    assert say("push", store, "me/six", "--public")[0] == 0
    assert calls[0] == ("me/six", {"repo_type": "dataset", "private": False, "exist_ok": True})
    assert "header.json" in calls[1]["allow_patterns"]


def official(root: Path, count: int = 5) -> Path:
    """A tiny LaViT-15k as its authors store it: 56 x 84 pixels, features 5120 wide, those of the last one missing."""
    records = []
    for name in ("images/gqa", "features/vtop", "features/trajectories"):
        (root / "data" / name).mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (56, 84), (40 * number, 80, 90)).save(root / f"data/images/gqa/{number}.png")
        scores = [0.01 * (number + 1), 0.02, 0.03, 0.04, 0.05, 0.06]
        steps = {"steps": [{"p_t": scores, "p_topk_idx": [5], "raw_attention_scores": scores}]}
        (root / f"data/features/trajectories/{number}.json").write_text(json.dumps(steps))
        if number < count - 1:
            torch.save(torch.full((6, 5120), number + 1.0), root / f"data/features/vtop/{number}.pth")
        records.append(
            {
                "question_id": number,
                "dataset": "gqa",
                "split": "train",
                "question": "What colour?",
                "ground_truth_enriched": "blue",
                "image_relative_path": f"gqa/{number}.png",
                "v_top_path_abs": f"/home/someone/data/features/vtop/{number}.pth",
                "attention_path_abs": f"data/features/trajectories/{number}.json",
            }
        )
    (root / "train.json").write_text(json.dumps({"results": records}))
    return root / "train.json"


def test_import(say: Say, tmp_path: Path) -> None:
    file, out = official(tmp_path / "published"), tmp_path / "store"
    bounds = ["--teacher.min_pixels", 784, "--teacher.max_pixels", 7840]
    code, _, error = say("import", file, out, "--root", tmp_path / "published", *bounds)
    assert code == 0, error
    store = TraceStore(out)
    assert len(store) == 4 and list(store.quarantined) == ["4"]
    assert all("features: there is no" in reason for reason in store.quarantined.values())
    for number, trace in enumerate(store):
        assert float(trace.gaze[0]) == pytest.approx(0.01 * (number + 1))
        assert torch.allclose(trace.semantics, torch.full((5120,), number + 1.0))
        assert (trace.tiles[0].height, trace.tiles[0].width) == (3, 2)
    torch.save(torch.ones(6, 5120), tmp_path / "published/data/features/vtop/4.pth")
    assert say("import", file, out, "--root", tmp_path / "published", "--retry", *bounds)[0] == 0
    assert len(TraceStore(out)) == 5 and not TraceStore(out).quarantined
    code, out_text, _ = say("stats", out, "--recipe", _recipe(tmp_path, file))
    assert code == 0 and next(line.split() for line in out_text.splitlines() if line.startswith("gqa "))[1] == "5"


def _recipe(folder: Path, file: Path) -> Path:
    images = file.parent / "data/images"
    (folder / "cfg.py").write_text(f"data = dict(name='lavit_15k', annotations={str(file)!r}, root={str(images)!r})\n")
    return folder / "cfg.py"


def test_import_that_finds_nothing_says_why(say: Say, tmp_path: Path) -> None:
    file = official(tmp_path / "published")
    code, _, error = say("import", file, tmp_path / "store", "--root", tmp_path / "published", "--limit", 2)
    assert code == 2 and "grid: map of 6 tokens, where the image and 200704 to 1003520 pixels give" in error
    assert error.count("error: ") == 1
    assert say("import", file, tmp_path / "b", "--root", tmp_path / "none")[0] == 2
    code, _, error = say("import", file, tmp_path / "c", "--root", tmp_path, "--extract.layers", "null")
    assert code == 2 and "extract.layers: the published features were recorded with" in error
