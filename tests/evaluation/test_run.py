"""Whole evaluations: the micro-lab's tasks, a published one from a local copy, and lmms-eval's own command."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from lmms_command import lmms_eval
from lmms_eval.models.registry_v2 import ModelManifest, ModelRegistryV2
from PIL import Image

from laavit.evaluation import manifest
from laavit.evaluation.bridge import Laavit, Settings
from laavit.evaluation.microlab_task import normalise
from laavit.evaluation.records import read_records
from laavit.evaluation.run import evaluate
from laavit.evaluation.statistics import wilson
from laavit.evaluation.tasks import load_tasks
from laavit.registry import UserError


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data sets are cached in a folder of the test session, and nothing is asked of the hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("LAAVIT_MICROLAB", raising=False)
        yield


@pytest.fixture(scope="module")
def first_run(
    export: Path, microlab_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    out = tmp_path_factory.mktemp("run")
    summary = evaluate(export, ["microlab_test"], out, batch_size=5, data_root=microlab_data)
    assert summary is not None
    return summary, read_records(out / "records.jsonl"), out


def test_records_are_what_the_model_says_alone(first_run: Any, export: Path, microlab_data: Path) -> None:
    """Every record against the model asked directly, one question at a time, and judged by hand."""
    _, records, _ = first_run
    [task] = load_tasks(["microlab_test"], data_root=microlab_data)
    model = Laavit(str(export))
    assert [record["id"] for record in records] == [f"q{i:03d}" for i in range(24)]
    for record, document in zip(records, task.dataset["test"]):
        content = [{"type": "image", "image": document["image"]}, {"type": "text", "text": document["question"]}]
        [answer] = model.answer([[{"role": "user", "content": content}]], Settings(4, ("\n\n",)))
        assert record["prediction"] == answer.text
        assert record["target"] == document["answer"]
        assert record["kind"] == document["kind"]
        assert record["correct"] == (answer.text.lower() == document["answer"].lower().strip(" ."))
        assert record["seconds"] > 0
    assert sum(record["correct"] for record in records) == 12


def test_summary_is_computed_from_the_records(first_run: Any, export: Path) -> None:
    summary, records, out = first_run
    assert summary == json.loads((out / "summary.json").read_text())
    assert sorted(file.name for file in out.iterdir()) == ["records.jsonl", "summary.json"]  # no temporary files left
    entry = summary["tasks"]["microlab_test"]
    assert (entry["n"], entry["accuracy"]) == (24, 0.5)
    assert (entry["low"], entry["high"]) == wilson(12, 24)
    assert entry["metrics"] == {"exact_match": 0.5}
    assert set(entry["by_kind"]) == {"colour", "count", "relation"}
    for kind, part in entry["by_kind"].items():
        own = [record["correct"] for record in records if record["kind"] == kind]
        assert (part["n"], part["accuracy"]) == (8, sum(own) / 8)
        assert (part["low"], part["high"]) == wilson(sum(own), 8)
    weights = (export / "model.safetensors").read_bytes()
    assert summary["weights_sha256"] == hashlib.sha256(b"model.safetensors" + weights).hexdigest()
    assert (summary["latents"], summary["system"], summary["model"]) == ("on", "look first", str(export))


def test_latents_off_reaches_the_answers(first_run: Any, export: Path, microlab_data: Path, tmp_path: Path) -> None:
    _, records, _ = first_run
    summary = evaluate(export, ["microlab_test"], tmp_path, batch_size=5, data_root=microlab_data, latents="off")
    assert summary is not None and summary["latents"] == "off"
    masked = [record["prediction"] for record in read_records(tmp_path / "records.jsonl")]
    assert masked != [record["prediction"] for record in records]


def test_limit_validation_split_and_stock_model(stock: Path, microlab_data: Path, tmp_path: Path) -> None:
    tasks = ["microlab_val", "microlab_test"]
    summary = evaluate(stock, tasks, tmp_path, batch_size=3, data_root=microlab_data, limit=4)
    assert summary is not None
    assert {task: entry["n"] for task, entry in summary["tasks"].items()} == dict.fromkeys(tasks, 4)
    assert summary["system"] is None


def test_an_evaluation_leaves_the_random_state_alone(export: Path, microlab_data: Path, tmp_path: Path) -> None:
    """Training evaluates in between and must go on to the same bits."""
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    evaluate(export, ["microlab_val"], tmp_path, data_root=microlab_data, limit=2)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_published_blink_from_a_local_copy(stock: Path, blink_root: Path, tmp_path: Path) -> None:
    """BLINK's own schema, prompt, note and judge; a question with two images among them."""
    summary = evaluate(stock, ["blink_relative_depth"], tmp_path, batch_size=2, data_root=blink_root)
    assert summary is not None
    entry = summary["tasks"]["blink_relative_depth"]
    records = read_records(tmp_path / "records.jsonl")
    assert entry["n"] == len(records) == 5
    assert entry["accuracy"] == entry["metrics"]["blink_acc"]
    assert [record["id"] for record in records] == [f"val_Relative_Depth_{i}" for i in range(1, 6)]
    assert [record["target"] for record in records] == ["(A)", "(B)", "(A)", "(B)", "(A)"]
    [task] = load_tasks(["blink_relative_depth"], data_root=blink_root)
    document = task.dataset["val"][2]
    content = [{"type": "image", "image": document[f"image_{i}"]} for i in (1, 2)]
    text = "Note: You only need to respond with A, B without providing any additional information.\n"
    content.append({"type": "text", "text": text + document["prompt"]})
    [answer] = Laavit(str(stock)).answer([[{"role": "user", "content": content}]], Settings(1024, ("\n\n",)))
    assert records[2]["prediction"] == answer.text.strip()


#: task -> folder under the data root, split, the columns as published, the kinds expected, the metric and its scale;
#: the others are in test_benchmarks.py
PUBLISHED: dict[str, tuple[str, str, list[dict[str, Any]], set[str], str, float]] = {
    "mmstar": (
        "MMStar",
        "val",
        [
            {
                "index": i,
                "question": "how many ? A one B two",
                "answer": "AB"[i % 2],
                "category": "math",
                "l2_category": "x",
            }
            for i in range(4)
        ],
        {"math"},
        "average",
        1,
    ),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_tasks_from_local_copies(task: str, stock: Path, tmp_path: Path) -> None:
    name, split, rows, kinds, metric, scale = PUBLISHED[task]
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(stream, format="PNG")
    rows = [{**row, "image": {"bytes": stream.getvalue(), "path": None}} for row in rows]
    (tmp_path / name).mkdir()
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    data.to_parquet(tmp_path / name / "data.parquet")
    readme = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: data.parquet\n---\n"
    if split != "train":  # what a folder without names of splits holds is `train`
        with pytest.raises(UserError, match=f"have no '{split}'"):
            load_tasks([task], data_root=tmp_path)
    (tmp_path / name / "README.md").write_text(readme)
    summary = evaluate(stock, [task], tmp_path / "out", batch_size=4, data_root=tmp_path)
    assert summary is not None
    entry = summary["tasks"][task]
    assert entry["n"] == len([row for row in rows if not kinds or row["category"] in kinds])
    assert set(entry["by_kind"]) == kinds
    assert entry["metrics"][metric] == pytest.approx(scale * entry["accuracy"])


def test_data_are_found_by_task_and_by_repository(blink_root: Path, tmp_path: Path) -> None:
    for name in ("blink_relative_depth", "BLINK-Benchmark/BLINK"):
        root = tmp_path / name.partition("/")[0]
        shutil.copytree(blink_root / "BLINK", root / name)
        [task] = load_tasks(["blink_relative_depth"], data_root=root)
        assert len(task.dataset["val"]) == 5


def test_mistakes_are_one_sentence(
    export: Path, microlab_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no demo has left its data
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        (["microlab_tset"], {}, r"no task is called 'microlab_tset'; \(?did you mean 'microlab_test'"),
        ([], {}, "no task was named"),
        (["microlab_test"], {"limit": 0}, "limit=0"),
        (["microlab_test"], {"data_root": tmp_path / "none"}, "is not a folder"),
        (["mmstar"], {"data_root": tmp_path}, "has no data for task 'mmstar'; looked for .*MMStar"),
        (["microlab_test"], {}, "give --data-root or set LAAVIT_MICROLAB"),
        (["microlab_test"], {"include_path": tmp_path / "none"}, "include_path"),
    ]
    for tasks, arguments, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            evaluate(export, tasks, tmp_path / "out", **arguments)
        assert len(str(caught.value)) < 600
    assert not (tmp_path / "out").exists()


def test_records_of_answers_that_are_neither_right_nor_wrong_are_refused() -> None:
    from laavit.evaluation.records import make_records

    sample = {"doc_id": 0, "doc": {}, "filtered_resps": ["x"], "target": "y", "anls": 0.4}
    with pytest.raises(UserError, match="gives no right or wrong"):
        make_records("docvqa", [sample], ["anls"], {})
    [record] = make_records("t", [sample | {"anls": {"score": 1.0}}], ["other", "anls"], {})
    assert record == {"task": "t", "id": "0", "prediction": "x", "target": "y", "correct": True}


def test_normalised_answers() -> None:
    assert normalise(" Red.\n") == normalise('"red"') == "red"
    assert normalise("dark  blue") == "dark blue"
    assert normalise("not red") != "red"
    assert normalise("1.5") == "1.5"


def test_manifest_is_one_lmms_eval_accepts() -> None:
    registry = ModelRegistryV2()
    entry = manifest()
    assert isinstance(entry, ModelManifest)
    registry.register_manifest(entry)
    assert registry.get_model_class("laavit") is Laavit


def test_lmms_evals_own_command_gives_the_same(
    first_run: Any, export: Path, microlab_data: Path, tmp_path: Path
) -> None:
    """``lmms-eval --model laavit …`` in a process of its own, with another batch size: equal scores, equal answers."""
    _, records, _ = first_run
    more = ("--batch_size", "4", "--log_samples")
    environment = {"LAAVIT_MICROLAB": str(microlab_data)}
    results = lmms_eval(export, ["microlab_test"], tmp_path, *more, cwd=tmp_path, environment=environment)
    assert json.loads(results.read_text())["results"]["microlab_test"]["exact_match,none"] == 0.5
    [samples] = (tmp_path / "out").rglob("*_samples_microlab_test.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    answers = [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    assert [a[0] if isinstance(a, list) else a for a in answers] == [record["prediction"] for record in records]
