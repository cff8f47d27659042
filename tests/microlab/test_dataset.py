from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import load_dataset

from laavit.data.visual_cot import VisualCoT
from laavit.microlab import dataset
from laavit.microlab.dataset import DatasetSettings, write_dataset
from laavit.microlab.questions import ask
from laavit.microlab.scenes import IMAGE_SIZE, make_scene
from laavit.registry import UserError

SMALL = DatasetSettings(train=4, val=2, test=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("microlab"), SMALL)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_visual_cot_reader_reads_back_every_question(root: Path) -> None:
    samples = VisualCoT(root / "train.json", root / "images")
    asked = [question for index in range(SMALL.train) for question in ask(make_scene(101, index))]
    assert len(samples) == len(asked)
    for sample, question in zip(samples, asked, strict=True):
        assert (sample.question, sample.answer) == (question.text, question.answer)
        assert (sample.source, sample.split) == (f"microlab_{question.kind}", "train")
        got = [(box.x1, box.y1, box.x2, box.y2) for box in sample.boxes]
        wanted = [tuple(x / IMAGE_SIZE for x in box) for box in question.boxes]
        assert [pytest.approx(box, abs=1e-3) for box in wanted] == got
        assert sample.images[0].is_file() and all(box.image == 0 for box in sample.boxes)


def test_a_record_has_the_published_form(root: Path) -> None:
    record = json.loads((root / "train.json").read_text())[5]
    path, *boxes = record["image"]
    assert all(box.startswith(f"{path}###[") for box in boxes)
    assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt", "human", "gpt"]
    assert record["conversations"][2]["value"] == "<image>"
    assert isinstance(record["question_id"], int)


def test_datasets_reads_the_evaluation_folder_offline(root: Path, tmp_path: Path) -> None:
    splits = load_dataset(str(root / "eval"), cache_dir=str(tmp_path))
    assert {name: len(rows) for name, rows in splits.items()} == {"validation": 12, "test": 18}
    row = splits["test"][7]
    assert set(row) == {"id", "image", "question", "answer", "kind", "boxes"}
    assert row["image"].size == (IMAGE_SIZE, IMAGE_SIZE)
    question = ask(make_scene(103, 1))[1]
    assert (row["question"], row["answer"], row["kind"]) == (question.text, question.answer, question.kind)
    assert len(row["boxes"]) == len(question.boxes)


def test_ids_are_unique_over_all_splits(root: Path) -> None:
    files = [json.loads((root / f"{name}.json").read_text()) for name in ("train", "val", "test")]
    ids = [record["question_id"] for records in files for record in records]
    assert len(ids) == len(set(ids)) == 6 * 9


def test_an_interrupted_call_goes_on_to_the_same_bytes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, render = [], dataset.render

    def failing(scene: object) -> object:
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(scene)
        return render(scene)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dataset, "render", failing)
        write_dataset(tmp_path, SMALL)
    assert not (tmp_path / "dataset.json").exists()
    monkeypatch.setattr(dataset, "render", lambda scene: drawn.append(scene) or render(scene))
    write_dataset(tmp_path, SMALL)
    assert len(drawn) == 9  # no picture was drawn twice
    assert contents(tmp_path) == contents(root)
    write_dataset(tmp_path, SMALL)
    assert len(drawn) == 9


def test_other_settings_are_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="other settings"):
        write_dataset(root, DatasetSettings(train=5, val=2, test=3))
    monkeypatch.setattr(dataset, "SCENES_VERSION", 0)
    with pytest.raises(UserError, match="other settings"):
        write_dataset(root, SMALL)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(UserError, match="at least one scene"):
        DatasetSettings(val=0)
