"""LLaVA conversations, LaViT-15k and tables by a map of columns, each with its own bad inputs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from laavit.data import Columns, Lavit15k, Llava
from laavit.images import open_image
from laavit.registry import DATASETS, UserError
from laavit.structures import Box


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("coco/a.png", "coco/b.png", "c.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 50), "red").save(path)
    return tmp_path / "images"


def write(root: Path, content: Any) -> Path:
    path = root.parent / "data.json"
    path.write_text(json.dumps(content))
    return path


def talk(*values: Any) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def reasons(reader: Any) -> dict[str, str]:
    return {found.id: found.reason for found in reader.quarantined}


def test_registered_by_name() -> None:
    assert [DATASETS.find(name) for name in ("Llava", "Lavit15k", "Columns")] == [Llava, Lavit15k, Columns]


# --- LLaVA ---


def test_llava_gives_a_sample_a_pair_of_turns(root: Path) -> None:
    record = {
        "id": "x",
        "image": "coco/a.png",
        "conversations": talk("<image>\nWhat is it?", "A dog. ", "Which colour?\n<image>", "Red."),
        "model": "m",
    }
    reader = Llava(write(root, [record]), root)
    assert reader.ids == ("x-1", "x-2") and not reader.quarantined
    assert [(s.question, s.answer) for s in reader] == [("What is it?", "A dog."), ("Which colour?", "Red.")]
    assert reader[0].source == "coco" and reader[0].meta == {"model": "m"} and reader[0].boxes == ()
    assert reader[1].images == ((root / "coco/a.png").resolve(),)


def test_llava_variants(root: Path) -> None:
    turns = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "<image><image> same?"},
        {"role": "assistant", "content": "no"},
    ]
    reader = Llava(
        write(
            root,
            [
                {"id": 1, "image": ["coco/a.png", "c.png"], "conversations": turns, "dataset": "pairs"},
                {"id": 2, "images": ["c.png"], "messages": turns[1:], "split": "val", "bboxes": [[0, 0, 0.5, 1]]},
            ],
        ),
        root,
    )
    assert reader.ids == ("1-1", "2-1")
    assert [path.name for path in reader[0].images] == ["a.png", "c.png"] and reader[0].source == "pairs"
    assert reader[1].source == "" and reader[1].split == "val" and reader[1].boxes == (Box(0, 0, 0.5, 1),)


def test_llava_numbers_conversations_that_share_an_id(root: Path) -> None:
    one, other = (
        {"id": "x", "image": "c.png", "conversations": talk(question, "yes")} for question in ("Red?", "Round?")
    )
    reader = Llava(write(root, [one, other, one, {**other, "id": "y"}, other]), root)
    assert reader.ids == ("x-1", "x-1~2", "y-1") and [s.question for s in reader] == ["Red?", "Round?", "Round?"]
    assert [(found.where, found.reason) for found in reader.quarantined] == [
        ("record 2", "duplicate: record 0 is the same"),
        ("record 4", "duplicate: record 1 is the same"),
    ]


LLAVA: dict[str, tuple[dict[str, Any], str, str]] = {
    "text only": ({"id": 1, "conversations": talk("q", "a")}, "1", "image: the record has none"),
    "no image in the list": (
        {"id": 1, "image": [], "conversations": talk("q", "a")},
        "1",
        "image: the record has none",
    ),
    "image is a number": ({"id": 1, "image": 3, "conversations": talk("q", "a")}, "1", "image: it is 3"),
    "climbs": ({"id": 1, "image": "../a.png", "conversations": talk("q", "a")}, "1", "image: .*'..'"),
    "no id": ({"image": "c.png", "conversations": talk("q", "a")}, "", "id: 'id' is None"),
    "no turns": ({"id": 1, "image": "c.png"}, "1", "conversations: they are nothing"),
    "no turn": ({"id": 1, "image": "c.png", "conversations": []}, "1", "conversations: there is no turn"),
    "swapped": (
        {"id": 1, "image": "c.png", "conversations": talk("q", "a")[::-1]},
        "1-1",
        "conversations: 'gpt' speaks",
    ),
    "a list": ({"id": 1, "image": "c.png", "conversations": talk(["q"], "a")}, "1-1", "conversations: what human says"),
    "empty": ({"id": 1, "image": "c.png", "conversations": talk("<image>", "a")}, "1-1", "question: it is empty"),
    "boxes": ({"id": 1, "image": "c.png", "conversations": talk("q", "a"), "bboxes": [[0, 0, 9, 1]]}, "1-1", "box: "),
}


@pytest.mark.parametrize("case", LLAVA)
def test_llava_quarantine(root: Path, case: str) -> None:
    record, key, reason = LLAVA[case]
    good = {"id": "g", "image": "c.png", "conversations": talk("q", "a")}
    reader = Llava(write(root, [record, good]), root)
    (found,) = reader.quarantined
    assert reader.ids == ("g-1",) and found.id == key
    assert found.reason.startswith(reason.split(".*")[0]), found.reason


def test_llava_keeps_the_good_pairs_of_a_record(root: Path) -> None:
    record = {"id": "x", "image": "c.png", "conversations": talk("q", "a", "q2", 5, "q3", "a3", "q4")}
    reader = Llava(write(root, [record]), root)
    assert reader.ids == ("x-1", "x-3") and set(reasons(reader)) == {"x-2", "x-4"}
    assert reasons(reader)["x-4"] == "conversations: the last question has no answer"


# --- LaViT-15k ---


def lavit(**changes: Any) -> dict[str, Any]:
    record = {
        "question_id": 7,
        "dataset": "gqa",
        "split": "train",
        "question": "What is red?\nProvide a short and direct response.",
        "ground_truth": "a box",
        "ground_truth_enriched": "a red box",
        "image_relative_path": "coco/a.png",
        "v_top_path_abs": "/their/v_top/7.pt",
        "attention_path_abs": "/their/sample_000007_attention.json",
        "trajectory": {"steps": [{"p_t": [0.1] * 50}]},
        "concentration": 0.4,
    }
    return record | changes


def test_lavit_15k_as_the_authors_store_it(root: Path) -> None:
    content = {"processing_params": {"x": [1, {"results": [2]}], "y": "]"}, "results": [lavit()], "after": 1}
    for form in (content, [lavit()], {"results": [lavit()]}):
        reader = Lavit15k(write(root, form), root)
        (sample,) = reader
        assert (sample.id, sample.source, sample.question, sample.answer) == ("7", "gqa", "What is red?", "a red box")
        assert sample.images == ((root / "coco/a.png").resolve(),)
        assert sample.meta == {
            "concentration": 0.4,
            "v_top_path": "/their/v_top/7.pt",
            "attention_path": "/their/sample_000007_attention.json",
        }


def test_lavit_15k_without_ids_and_with_boxes(root: Path) -> None:
    records = [
        {k: v for k, v in lavit(bboxes=[[0, 0, 0.5, 0.5]]).items() if k != "question_id"},
        lavit(ground_truth_enriched="", bboxes=[[10, 10, 50, 40]]),
        lavit(question_id=8, v_top_path_abs=3),
        lavit(question_id=9, image_relative_path="/abs.png"),
        lavit(question_id=10, bboxes=3),
    ]
    reader = Lavit15k(write(root, {"results": records}), root)
    assert reader.ids == ("0", "7") and reader[1].answer == "a box"
    assert reader[0].boxes == (Box(0, 0, 0.5, 0.5),) and reader[1].boxes == (Box(0.1, 0.2, 0.5, 0.8),)
    assert {k: v.split(":")[0] for k, v in reasons(reader).items()} == {"8": "features", "9": "image", "10": "box"}


# --- tables ---


def picture(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 20), colour).save(stream, "PNG")
    return stream.getvalue()


def saved(folder: Path) -> Path:
    """A DatasetDict with images inside, as ``save_to_disk`` writes it; a selection, so that it has indices."""
    features = datasets.Features(
        {
            "query": datasets.Value("string"),
            "label": datasets.Value("string"),
            "img": datasets.Image(),
            "bbox": datasets.List(datasets.List(datasets.Value("float64"))),
            "uid": datasets.Value("int64"),
        }
    )
    rows = {
        "query": ["Red?", "Blue?", ""],
        "label": ["yes", "no", "x"],
        "img": [{"bytes": picture(c), "path": None} for c in ("red", "blue", "red")],
        "bbox": [[[4, 2, 20, 10]], [], [[0, 0, 1, 1]]],
        "uid": [5, 6, 7],
    }
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=whole.select([1, 0, 2]), test=whole.select([0])).save_to_disk(str(folder))
    return folder


MAP = {"question": "query", "answer": "label", "image": "img", "boxes": "bbox", "id": "uid"}


def test_a_saved_data_set_with_images_inside(tmp_path: Path) -> None:
    reader = Columns(saved(tmp_path / "saved"), columns=MAP, box_unit="pixel")
    # the test split's row is the same sample with another split
    assert reader.ids == ("train-6", "train-5", "test-5") and reasons(reader) == {"7": "question: it is empty"}
    sample = reader[1]
    assert (sample.question, sample.answer, sample.split) == ("Red?", "yes", "train")
    assert sample.boxes == (Box(0.1, 0.1, 0.5, 0.5),) and reader[0].boxes == ()
    assert open_image(sample.images[0]).getpixel((1, 1)) == (255, 0, 0)
    assert reader[1].images == reader[2].images, "the same bytes are kept once"
    assert Columns(tmp_path / "saved", columns=MAP, box_unit="pixel", split="test").ids == ("test-5",)


def test_parquet_arrow_and_lines(tmp_path: Path, root: Path) -> None:
    rows = [
        {"question": "Red?", "answer": "yes", "image": "coco/a.png", "box": [0.0, 0.0, 0.5, 1.0]},
        {"question": "Two?", "answer": "no", "image": "c.png", "box": None},
        {"question": "Out?", "answer": "no", "image": "../c.png", "box": None},
    ]
    table = pa.Table.from_pylist(rows)
    for name in ("parquet", "arrow", "lines"):
        (tmp_path / name).mkdir()
    pa.parquet.write_table(table, tmp_path / "parquet" / "train-00000-of-00001.parquet")
    with pa.ipc.new_file(tmp_path / "arrow" / "train.arrow", table.schema) as file:
        file.write_table(table)
    (tmp_path / "lines" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("parquet", "arrow", "lines"):
        for place in (tmp_path / name, next((tmp_path / name).iterdir())):
            reader = Columns(place, root, {"boxes": "box"})
            assert reader.ids == ("0", "1") and reader[0].boxes == (Box(0, 0, 0.5, 1),) and reader[1].boxes == ()
            assert reader[1].images == ((root / "c.png").resolve(),) and reader[0].split == "train"
            assert reasons(reader).keys() == {"2"}


def test_several_images_and_boxes_of_a_row(tmp_path: Path, root: Path) -> None:
    row = {"question": "Same?", "answer": "no", "image": ["c.png", "coco/a.png"], "boxes": [[0, 0, 0.5, 1]] * 2}
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(row | {"on": on}) for on in ([1, 0], [0], [0, 2], None)))
    reader = Columns(path, root, {"boxes": "boxes", "box_images": "on"})
    assert [box.image for box in reader[0].boxes] == [1, 0] and len(reader) == 1
    assert [found.kind for found in reader.quarantined] == ["box"] * 3


def test_mistakes_in_a_map_are_one_sentence(tmp_path: Path, root: Path) -> None:
    folder = saved(tmp_path / "saved")
    with pytest.raises(UserError, match=r"no field is called 'qestion'.*did you mean 'question'"):
        Columns(folder, columns={"qestion": "query"})
    with pytest.raises(UserError, match=r"columns.question: .* has no column 'question'.*allowed: bbox, img"):
        Columns(folder)
    with pytest.raises(UserError, match=r"box_unit: got 'pixels'.*did you mean 'pixel'"):
        Columns(folder, columns=MAP, box_unit="pixels")
    with pytest.raises(UserError, match="does not exist"):
        Columns(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no data files"):
        Columns(tmp_path / "empty")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"bad\.parquet' cannot be read"):
        Columns(tmp_path / "bad.parquet")
    (tmp_path / "paths.jsonl").write_text(json.dumps({"question": "q", "answer": "a", "image": "c.png"}))
    with pytest.raises(UserError, match="is a path, and no root is given"):
        Columns(tmp_path / "paths.jsonl")
    (folder / "train" / "state.json").write_text("{")
    with pytest.raises(UserError, match="does not read as a saved data set"):
        Columns(folder, columns=MAP | {"id": "query"})


def test_numbers_are_answers_too(tmp_path: Path, root: Path) -> None:
    table = pa.table({"question": ["How many?"], "answer": pa.array([3]), "image": ["c.png"]})
    pa.parquet.write_table(table, tmp_path / "n.parquet")
    assert Columns(tmp_path / "n.parquet", root)[0].answer == "3"
    assert np.asarray(open_image(Columns(tmp_path / "n.parquet", root)[0].images[0])).shape == (50, 100, 3)
