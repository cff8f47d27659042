"""The Visual-CoT reader: both published forms, boxes, ids, paths, and a corpus of bad inputs."""

import json
import math
import os

import pytest
from PIL import Image

from laavit.data.visual_cot import VisualCoT
from laavit.registry import DATASETS, UserError
from laavit.structures import Box

REQUEST = " Please provide the bounding box coordinate of the region that can help you answer the question better."


def four(question_id=1, path="cot/a.png", pixels="[10, 10, 50, 40]", box="[0.1, 0.2, 0.5, 0.8]", **changes):
    """A record as viscot_363k.json has them, of a 100 x 50 image."""
    record = {
        "dataset": "flickr30k",
        "split": "train",
        "question_id": question_id,
        "image": [path, f"{path}###{pixels}"],
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat does the child wear?{REQUEST}"},
            {"from": "gpt", "value": box},
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": "Blue shorts."},
        ],
    }
    return record | changes


def two(question_id=1, path="cot/a.png", **changes):
    """A record of the short form."""
    record = {
        "dataset": "flickr30k",
        "split": "train",
        "question_id": question_id,
        "image": [path],
        "conversations": [
            {"from": "human", "value": "<image>\nWhat does the child wear?\nProvide a short and direct response."},
            {"from": "gpt", "value": "<lvr>\n<answer> Blue shorts. </answer>"},
        ],
        "bboxes": [[0.1, 0.2, 0.5, 0.8]],
    }
    return record | changes


def talk(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    (folder / "cot").mkdir(parents=True)
    Image.new("RGB", (100, 50)).save(folder / "cot" / "a.png")
    Image.new("RGB", (40, 40)).save(folder / "cot" / "b.png")
    return folder


@pytest.fixture
def read(tmp_path, root):
    def reader(records, **arguments):
        file = tmp_path / "annotations.json"
        file.write_text(records if isinstance(records, str) else json.dumps(records), encoding="utf-8")
        return VisualCoT(file, root, **arguments)

    return reader


def test_both_forms_give_the_same_sample(read, root):
    long, short = read([four()])[0], read([two()])[0]
    assert long == short
    assert long.id == "1" and long.source == "flickr30k" and long.split == "train"
    assert long.question == "What does the child wear?" and long.answer == "Blue shorts."
    assert long.images == ((root / "cot/a.png").resolve(),)
    assert long.boxes == (Box(0.1, 0.2, 0.5, 0.8, 0),)


def test_registered():
    assert DATASETS.find("VisualCoT") is VisualCoT


def test_pixel_boxes_are_divided_by_the_real_size(read):
    record = two(image=["cot/a.png", "cot/a.png###[10, 10, 50, 40]"])
    del record["bboxes"]
    assert read([record])[0].boxes == (Box(0.1, 0.2, 0.5, 0.8, 0),)


def test_a_box_that_rounding_made_flat_is_taken_from_its_pixels(read):
    assert read([four(pixels="[10, 10, 10.01, 40]", box="[0.1, 0.2, 0.1, 0.8]")])[0].boxes[0].x2 == pytest.approx(
        0.1001
    )


def test_several_images_and_boxes(read):
    record = four(
        image=["cot/a.png", "cot/b.png", "cot/b.png###[0, 0, 20, 20]", "cot/a.png###[0, 0, 100, 25]"],
        conversations=talk(f"<image><image>\nSame?{REQUEST}", "[0, 0, 0.5, 0.5], [0, 0, 1, 0.5]", "<image>", "no"),
    )
    sample = read([record])[0]
    assert [path.name for path in sample.images] == ["a.png", "b.png"]
    assert sample.boxes == (Box(0, 0, 0.5, 0.5, 1), Box(0, 0, 1, 0.5, 0))
    assert sample.question == "Same?"


def test_one_path_as_text_and_no_box(read):
    record = two(image="cot/b.png")
    del record["bboxes"]
    sample = read([record])[0]
    assert sample.boxes == () and len(sample.images) == 1


def test_other_keys_become_meta_and_any_script_survives(read):
    record = two(kind="attribute", hops=[1, 2], conversations=talk("这是什么颜色？", "<answer>藍 \u202eü</answer>"))
    sample = read([record])[0]
    assert sample.meta == {"kind": "attribute", "hops": [1, 2]}
    assert sample.question == "这是什么颜色？" and sample.answer == "藍 \u202eü"


@pytest.mark.parametrize("box", ["[-0.005, 0, 0.5, 1.002]", "[0, 0, 1.01, 1]"])
def test_a_small_overshoot_is_clamped(read, box):
    corners = read([four(box=box)])[0].boxes[0]
    assert 0 <= corners.x1 < corners.x2 <= 1 and 0 <= corners.y1 < corners.y2 <= 1


def test_ids_are_prefixed_only_where_they_collide(read):
    assert read([four(1), four(2, dataset="gqa")]).ids == ("1", "2")
    assert read([four(1), four(1, dataset="gqa"), four(2)]).ids == ("flickr30k-1", "gqa-1", "flickr30k-2")
    assert read([four(1), four("1", split="val")]).ids == ("flickr30k-train-1", "flickr30k-val-1")


def test_ids_depend_on_neither_split_nor_limit(read):
    records = [four(1), four(1, split="val"), four(2)]
    whole = read(records).ids
    assert read(records, split="train").ids == (whole[0], whole[2])
    assert read(records, limit=1).ids == whole[:1]


def test_it_is_a_sequence(read):
    data = read([four(1), four(2), four(3)])
    assert len(data) == 3 and data[-1].id == "3" and [sample.id for sample in data[1:]] == ["2", "3"]
    assert [sample.id for sample in data] == list(data.ids) and data.get("2").id == "2"
    with pytest.raises(IndexError):
        data[3]
    with pytest.raises(UserError, match="'nine'"):
        data.get("nine")


def test_opening_touches_no_image(read, root):
    (root / "cot/a.png").unlink()
    data = read([four()])
    with pytest.raises(UserError, match=r"record 0 .*question_id 1.*'cot/a.png'"):
        data.check()


def test_the_header_is_enough(read, root):
    whole = (root / "cot/a.png").read_bytes()
    (root / "cot/a.png").write_bytes(whole[:45])  # the size is there, the pixels are not
    record = two(image=["cot/a.png###[10, 10, 50, 40]"])
    del record["bboxes"]
    assert read([record])[0].boxes == (Box(0.1, 0.2, 0.5, 0.8, 0),)


BAD = {
    "broken JSON": ('[{"a": 1', "not valid JSON"),
    "empty file": ("", "not valid JSON"),
    "no list": ({"results": []}, "list of Visual-CoT records"),
    "no records": ([], "holds no records"),
    "record is a text": (["x"], "record 0"),
    "record is null": ([four(), None], "record 1"),
    "deep nesting": ("[" * 200_000, "nested too deeply|not valid JSON"),
    "no id": ([{k: v for k, v in four().items() if k != "question_id"}], "'question_id' is None"),
    "id of another type": ([four([1])], "'question_id'"),
    "id is true": ([four(True)], "'question_id'"),
    "dataset is a number": ([four(dataset=3)], "'dataset'"),
    "duplicate": ([four(7), four(8), four(7)], "'flickr30k-train-7'.*record 0.*record 2"),
    "image is null": ([four(image=None)], "'image'"),
    "image is an empty list": ([four(image=[])], "'image'"),
    "image holds a number": ([four(image=["a.png", 3])], "'image'"),
    "empty path": ([four(image=[""])], "path is empty"),
    "null character": ([four(path="cot/\0a.png")], "null character"),
    "absolute path": ([four(path="/etc/passwd")], "is absolute or"),
    "climbing path": ([four(path="cot/../../a.png")], "is absolute or"),
    "windows path": ([four(path="C:\\a.png")], "is absolute or"),
    "backslash climb": ([four(path="cot\\..\\..\\a.png")], "is absolute or"),
    "pixel box broken": ([four(pixels="[1, 2")], "not of the form"),
    "pixel box of three": ([four(pixels="[1, 2, 3]")], "not four numbers"),
    "no turns": ([four(conversations=None)], "'conversations' has nothing"),
    "three turns": ([four(conversations=talk("q", "[0,0,1,1]", "a"))], "3 turns"),
    "turn is a text": ([four(conversations=["q", "a"])], "turn 1"),
    "speakers swapped": ([four(conversations=talk("q", "a")[::-1])], "turn 1"),
    "value is a list": ([four(conversations=[{"from": "human", "value": ["q"]}, {}])], "turn 1"),
    "empty question": ([four(conversations=talk("<image>\n" + REQUEST, "[0,0,1,1]", "", "a"))], "question is empty"),
    "empty answer": ([two(conversations=talk("q?", "<answer> </answer>"))], "answer is empty"),
    "no box": ([four(box="I cannot tell")], "no box"),
    "box of words": ([four(box="[a, b, c, d]")], "not four numbers"),
    "box of five": ([four(box="[0, 0, 1, 1, 1]")], "not four numbers"),
    "NaN": ([four(box="[nan, 0, 1, 1]")], "not finite"),
    "infinity": ([four(box="[0, 0, 1, 1e999]")], "not finite"),
    "inverted": ([four(box="[0.5, 0, 0.4, 1]")], "inverted"),
    "too far out": ([four(box="[0, 0, 1.02, 1]")], "1 % past"),
    "far below zero": ([four(box="[-0.02, 0, 1, 1]")], "1 % past"),
    "outside altogether": ([two(bboxes=[[1.001, 0, 1.005, 1]])], "no area"),
    "flat": ([two(bboxes=[[0.5, 0, 0.5, 1]])], "no area"),
    "bboxes is a text": ([two(bboxes="[0,0,1,1]")], "'bboxes'"),
    "bboxes of texts": ([two(bboxes=[["0", "0", "1", "1"]])], "not four numbers"),
    "bboxes with NaN": ([two(bboxes=[[math.nan, 0, 1, 1]])], "not finite"),
    "bboxes of a huge number": ([two(bboxes=[[0, 0, 10**400, 1]])], "not four numbers"),
    "box count differs": ([four(box="[0, 0, 1, 1] [0, 0, 0.5, 1]")], "2 normalised boxes"),
    "box on which image": ([two(image=["cot/a.png", "cot/b.png"])], "on which of the 2 images"),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_bad_input_is_one_clear_sentence(read, case):
    records, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        read(records)
    assert "\n" not in str(error.value) or case == "broken JSON"
    assert isinstance(records, str) or "annotations.json" in str(error.value)


LATE = {
    "missing image": (four(path="cot/none.png"), "no image 'cot/none.png'"),
    "image is a folder": (four(path="cot"), "no image 'cot'"),
    "leads out by a link": (four(path="cot/out.png"), "leads out of"),
    "no image file": (two(image=["cot/text.png###[1, 1, 2, 2]"], bboxes=None), "cannot be read"),
    "pixel box too far out": (two(image=["cot/a.png###[1, 1, 102, 2]"], bboxes=None), "100 x 50 pixels"),
    "pixel box of no area": (two(image=["cot/a.png###[5, 5, 5, 9]"], bboxes=None), "no area"),
}


@pytest.mark.parametrize("case", LATE, ids=list(LATE))
def test_bad_images_and_pixel_boxes_name_the_record(read, root, tmp_path, case):
    Image.new("RGB", (100, 50)).save(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", root / "cot/out.png")
    (root / "cot/text.png").write_text("no picture")
    record, message = LATE[case]
    data = read([record])
    with pytest.raises(UserError, match=message) as error:
        data.check()
    assert "record 0" in str(error.value) and "question_id 1" in str(error.value)


def test_bad_arguments(read, tmp_path, root):
    with pytest.raises(UserError, match="did you mean 'train'"):
        read([four()], split="trian")
    for limit in (0, -1, True, 1.5):
        with pytest.raises(UserError, match="limit"):
            read([four()], limit=limit)
    with pytest.raises(UserError, match="does not exist"):
        VisualCoT(tmp_path / "none.json", root)
    with pytest.raises(UserError, match="image folder"):
        VisualCoT(tmp_path / "annotations.json", tmp_path / "none")
    (tmp_path / "latin.json").write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match="not valid JSON"):
        VisualCoT(tmp_path / "latin.json", root)
    with pytest.raises(UserError, match="cannot be read"):
        VisualCoT(tmp_path, root)
